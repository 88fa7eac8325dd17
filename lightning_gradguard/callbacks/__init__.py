"""Trainer hooks: shells that validate, ask, act and report, one class a file."""
