"""Trials: short runs of a program on recorded batches, and the files that they leave."""
