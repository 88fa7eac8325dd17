"""Snapshots of a Trainer: when they are taken, what goes into one, returning to it."""
