"""A report as text, HTML or JSON."""
