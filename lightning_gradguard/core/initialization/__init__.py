"""Criteria that a freshly initialized network must meet, cures of where it does not, and its repair."""

from .criteria import check, check_weights, copied_units, measure, nonfinite_weights, values_of
from .cures import improves, with_cures
from .findings import SEVERITIES, Finding, InitializationError, fails, one_line, table, tried_cure, with_unit
from .propagation import propagate
from .repair import frozen_layers, holds_default_initialization, repair
