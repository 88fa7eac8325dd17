"""The interface between a suite and its members."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import pytorch_lightning as pl
from torch import Tensor

from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.runtime.steps.step import StepVerdict

#: The methods of a member that are called only if it overrides them.
OptionalHook = Literal["check_step", "step_flags", "wants_weight_norms"]


@dataclass
class StepFlags:
    """Flags that a member adds to the reduction of the next step; each is set on all ranks if it is on one.

    Args:
        nonfinite_weights: Shape `()`, on the device; `None` if the weights were not scanned.
        nonfinite_buffers: The same for buffers.
        repeats_lost_batch: True if the step holds a batch that the run, before it was resumed, had lost.
        check_now: True, on all ranks alike, if the check of the step must not be deferred.
    """

    nonfinite_weights: Tensor | None = None
    nonfinite_buffers: Tensor | None = None
    repeats_lost_batch: bool = False
    check_now: bool = False


class StepMember(Protocol):
    """A participant in the shared step; `StepCallback` implements it.

    Attributes:
        norm_types: Norm types to measure in addition to 2.
        wants_units: True if norms of single units are to be measured.
        defers_check: True if `check_step` may be called one step late, without a host synchronization.
    """

    norm_types: tuple[float, ...]
    wants_units: bool
    defers_check: bool

    def overrides(self, hook: OptionalHook) -> bool:
        """True if the member implements an optional hook."""

    def wants_weight_norms(self, trainer: pl.Trainer) -> bool:
        """True if the next step is to be measured for norms of the weights."""

    def step_flags(self) -> StepFlags:
        """Flags to include in the reduction of the next step."""

    def check_step(self, trainer: pl.Trainer, measurement: Measurement) -> StepVerdict:
        """The member's verdict on a step."""

    def on_deferred_verdict(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        measurement: Measurement,
        verdict: StepVerdict,
    ) -> None:
        """Called with the verdict on the step before, when its check was deferred."""

    def final_counts(self) -> Mapping[str, float]:
        """Counts of the run, by tag."""
