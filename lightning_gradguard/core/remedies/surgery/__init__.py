"""Changes of a network in place: activations, normalization, residual additions, recurrence, weights."""
