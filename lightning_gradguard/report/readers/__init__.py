"""Reads what a run left in its folder."""
