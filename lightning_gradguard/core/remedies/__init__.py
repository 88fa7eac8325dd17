"""Advice and remedies for incidents, causes and symptoms."""

from .selection import Present, advice, advice_for_cause, advice_for_symptom, remedies
