"""Arithmetic on tensors that needs torch alone and serves any training loop."""
