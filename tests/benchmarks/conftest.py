"""Tests of the cost benchmarks need greenlet, which `make bench` installs."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("greenlet") else ["test_cost.py"]
