"""Measures what the suite protects from: faults are injected into training runs, and their outcomes compared."""
