"""Failing and healthy programs of published benchmarks, rebuilt from what is known of them."""
