"""Incidents: published, examined, replayed, and written to the run's folder."""
