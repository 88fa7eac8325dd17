"""Samples of a training run: when they are taken, what is measured, and how other ranks learn of it."""
