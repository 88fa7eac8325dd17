"""Parses the command line of `fit`, `check` and `replay`, and instantiates the classes that it names."""
