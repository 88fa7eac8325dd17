"""Copies of training state in memory, and their restoration in place."""

from .buffers import BufferCopies, FiniteBuffers
from .nonfinite import any_nonfinite
from .preservation import (
    StepRandomness,
    preserve_randomness,
    preserve_state,
    preserve_weights,
    rng_state,
    set_rng_state,
)
from .ring import SnapshotRing
from .snapshot import Snapshot
from .statistics import SEEN, has_jumped, has_outlying_row, is_out_of_range, running_variances
