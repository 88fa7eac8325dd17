"""Measurements of the cost of the suite, and of what it protects from."""
