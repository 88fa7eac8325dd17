"""Diagnoses a finished run from what it logged."""
