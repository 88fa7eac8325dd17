"""Copies of training state in memory, and their restoration in place."""

from lightning_gradguard.core.snapshots.buffers import BufferCopies as BufferCopies
from lightning_gradguard.core.snapshots.module_state import preserve_state as preserve_state
from lightning_gradguard.core.snapshots.nonfinite import any_nonfinite as any_nonfinite
from lightning_gradguard.core.snapshots.ring import SnapshotRing as SnapshotRing
from lightning_gradguard.core.snapshots.rng import rng_state as rng_state
from lightning_gradguard.core.snapshots.rng import set_rng_state as set_rng_state
from lightning_gradguard.core.snapshots.snapshot import Snapshot as Snapshot
