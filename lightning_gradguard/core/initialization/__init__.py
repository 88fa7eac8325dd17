"""Criteria that a freshly initialized network must meet, and its repair."""

from .criteria import check, check_weights, copied_units, nonfinite_weights
from .finding import Finding, InitializationError, table
from .probe import probe
from .repair import holds_default_initialization, repair
