"""The treatment benchmark: generated programs, of which `treat` has to cure those that fail."""
