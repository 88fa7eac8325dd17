"""Criteria that a freshly initialized network must meet, and its repair."""

from lightning_gradguard.core.initialization.criteria import check as check
from lightning_gradguard.core.initialization.finding import Finding as Finding
from lightning_gradguard.core.initialization.finding import InitializationError as InitializationError
from lightning_gradguard.core.initialization.finding import table as table
from lightning_gradguard.core.initialization.probe import probe as probe
from lightning_gradguard.core.initialization.repair import (
    holds_default_initialization as holds_default_initialization,
)
from lightning_gradguard.core.initialization.repair import repair as repair
from lightning_gradguard.core.initialization.weights import check_weights as check_weights
from lightning_gradguard.core.initialization.weights import copied_units as copied_units
from lightning_gradguard.core.initialization.weights import nonfinite_weights as nonfinite_weights
