"""Rates that are too high, and what the suite makes of them."""
