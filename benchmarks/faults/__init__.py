"""Measures what becomes of training runs into which faults are injected."""
