"""Reads the files in the folder of a run."""
