"""Criteria that a freshly initialized network must meet, and its repair."""

from .criteria import (
    Finding,
    InitializationError,
    check,
    check_weights,
    copied_units,
    nonfinite_weights,
    table,
)
from .probe import probe
from .repair import holds_default_initialization, repair
