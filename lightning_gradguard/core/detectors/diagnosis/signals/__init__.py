"""Measurements of a sampled step: hooks on layers, calls of functions, numbers on the device."""
