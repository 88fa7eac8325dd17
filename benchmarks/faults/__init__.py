"""Measures the outcomes of training runs into which faults are injected."""
