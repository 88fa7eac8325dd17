"""Measurements of the cost of the suite, and of its effect under faults."""
