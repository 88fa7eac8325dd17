"""Finds by experiment what makes a failing program train."""
