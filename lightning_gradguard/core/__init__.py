"""Arithmetic on tensors and pure state machines for any training loop; needs torch alone."""
