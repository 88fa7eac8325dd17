"""Output of a run: metrics, charts, console messages, pages."""
