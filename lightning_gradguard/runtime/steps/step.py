"""One optimizer step, as members of a suite see it, and the flags that they add to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core.norms import Gradients, Measurement, PackedMeasurement
from lightning_gradguard.runtime.optimizer_hooks import supports_fused_override
from lightning_gradguard.runtime.steps.parameters import Selection

#: `"accept"`: the step takes place and may enter histories. `"skip"`: it must not take place. `"ignore"`: it
#: enters no history, and the GradScaler deals with it.
StepVerdict = Literal["accept", "skip", "ignore"]


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

    @classmethod
    def merged(cls, flags: Sequence[StepFlags]) -> StepFlags:
        """Returns the flags of several members as one."""
        return cls(
            nonfinite_weights=_either([f.nonfinite_weights for f in flags]),
            nonfinite_buffers=_either([f.nonfinite_buffers for f in flags]),
            repeats_lost_batch=any(f.repeats_lost_batch for f in flags),
            check_now=any(f.check_now for f in flags),
        )


def _either(flags: Sequence[Tensor | None]) -> Tensor | None:
    present = [flag for flag in flags if flag is not None]
    return torch.stack(present).any() if present else None


@dataclass
class Step:
    """An optimizer step between measuring and stepping.

    Args:
        optimizer: The optimizer about to step.
        optimizer_index: Its position in `trainer.optimizers`.
        gradients: As measured, before any callback writes to them.
        selection: The parameters that were measured.
        other_norms: Norm of each gradient by `norm_type`, other than 2.
        weight_norms: L2 norm of each weight before the step, if a callback asked for it.
        is_checked: True if a callback checks the step, now or before the next one.
        is_deferred: True if the check takes place before the next step.
        packed: The numbers that checks are based on, on the device.
        measurement: The same numbers on the host; `None` if they are on a device, and no callback checks
            steps or the check is deferred.
        verdict: The same for every callback and rank; `"accept"` while the check is deferred.
        accepted: True if the step may enter histories.
        inside_closure: True if the optimizer evaluates the loss several times in one step (LBFGS): callbacks
            only watch then.
    """

    optimizer: Optimizer
    optimizer_index: int
    gradients: Gradients
    selection: Selection
    other_norms: Mapping[float, Tensor]
    weight_norms: Tensor | None
    is_checked: bool
    is_deferred: bool
    packed: PackedMeasurement
    measurement: Measurement | None
    verdict: StepVerdict
    accepted: bool
    inside_closure: bool

    @property
    def tensor_norms(self) -> Mapping[float, Tensor]:
        """Norm of each gradient by `norm_type`."""
        return {2.0: self.gradients.norms, **self.other_norms}

    @property
    def loss(self) -> Tensor:
        """Mean loss of the step, a scalar on the device."""
        return self.packed.mean_loss()

    @property
    def supports_fused_override(self) -> bool:
        """True if the optimizer's own kernel can scale the gradients (in float32), or skip the update."""
        selection = self.selection
        is_plain = not (self.inside_closure or selection.is_sharded or selection.has_doubles)
        return is_plain and supports_fused_override(self.optimizer)
