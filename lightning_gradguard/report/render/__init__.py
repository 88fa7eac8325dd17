"""Renders reports as text, HTML and JSON."""
