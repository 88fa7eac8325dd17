"""One optimizer step, from its first batch to its outcome."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from lightning_gradguard.core.norms import Measurement
from lightning_gradguard.runtime.incidents.replay import SeenBatch
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.trainer_state import TrainerState

#: `"open"`: batches accumulate. `"deferred"`: the step took place and is checked later. `"committed"`: it
#: took place. `"skipped"`: it did not, or was undone. `"overflowed"`: the GradScaler skips it. `"discarded"`:
#: its batches lead to no step.
TransactionState = Literal["open", "deferred", "committed", "skipped", "overflowed", "discarded"]


@dataclass(slots=True)
class Window:
    """The batches that lead to one step of each optimizer.

    Args:
        step: `trainer.global_step` when it began.
        before: The training state besides tensors at that time; `None` where it is never restored.
        batches: As `training_step` got them; empty where none is ever examined.
        n_batches: Number of batches.
        repeats_skipped_batch: True if one of them was skipped by the run that this one resumes.
    """

    step: int
    before: TrainerState | None = None
    batches: list[SeenBatch] = field(default_factory=list)
    n_batches: int = 0
    repeats_skipped_batch: bool = False


@dataclass(slots=True)
class StepTransaction:
    """One optimizer step: it is committed, or leaves no trace.

    Args:
        window: Its batches; optimizers that step in the same batch share one.
        batch_idx: The last of the batches.
        state: Where the transaction stands.
        measurement: Its numbers; `None` until they are on the host.
        names: Names of the parameters with a gradient; empty if the host knows that all are finite.
        norms: Norms of these gradients, shape `(n,)`; `None` if the host knows that all are finite.
    """

    window: Window
    batch_idx: int = 0
    state: TransactionState = "open"
    measurement: Measurement | None = None
    names: tuple[str, ...] = ()
    norms: Tensor | None = None

    def close(self, state: TransactionState, step: Step) -> StepTransaction:
        """Returns the closed transaction: this one, or that of a further optimizer on the same batches."""
        closed = self if self.state == "open" else replace(self)
        closed.state = state
        closed.measurement = step.measurement
        is_good = state == "deferred" and step.measurement is not None and not step.measurement.must_skip
        if state != "committed" and not is_good:  # to read the norms takes two operations
            closed.names, closed.norms = step.gradients.names, step.gradients.norms
        return closed
