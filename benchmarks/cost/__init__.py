"""Measures the cost of the suite: operations, time and memory that it adds to a training step."""
