"""Shared by the callbacks while a Trainer runs: steps, rollback, incidents, logging."""
