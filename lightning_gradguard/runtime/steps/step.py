"""An optimizer step between measuring and stepping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core.norms import Gradients, Measurement
from lightning_gradguard.runtime.fused_optimizer import supports_fused_override
from lightning_gradguard.runtime.steps.measuring import PackedMeasurement
from lightning_gradguard.runtime.steps.parameters import Selection

#: `"accept"`: the step takes place and may enter histories. `"skip"`: it must not take place. `"ignore"`: it
#: enters no history, and the GradScaler deals with it.
StepVerdict = Literal["accept", "skip", "ignore"]


@dataclass
class Step:
    """An optimizer step between measuring and stepping.

    Args:
        optimizer: The optimizer about to step.
        optimizer_index: Its position in `trainer.optimizers`.
        gradients: As measured, before any callback writes to them.
        selection: The parameters that were measured.
        tensor_norms: Norm of each gradient by `norm_type`.
        weight_norms: L2 norm of each weight before the step, if a callback asked for it.
        is_checked: True if a callback checks the step, now or before the next one.
        packed: The numbers that checks are based on, on the device.
        measurement: The same numbers on the host; `None` if no callback checks steps, or while the check is
            deferred.
        verdict: The same for every callback and rank; `"accept"` while the check is deferred.
        inside_closure: True if the optimizer evaluates the loss several times in one step (LBFGS): callbacks
            only watch then.
    """

    optimizer: Optimizer
    optimizer_index: int
    gradients: Gradients
    selection: Selection
    tensor_norms: Mapping[float, Tensor]
    weight_norms: Tensor | None
    is_checked: bool
    packed: PackedMeasurement
    measurement: Measurement | None
    verdict: StepVerdict
    inside_closure: bool

    @property
    def accepted(self) -> bool:
        """True if the step may enter histories."""
        return self.verdict == "accept"

    @property
    def loss(self) -> Tensor:
        """Mean loss of the step, a scalar on the device."""
        return self.packed.mean_loss()

    @property
    def supports_fused_override(self) -> bool:
        """True if the optimizer's own kernel can scale the gradients (in float32), or skip the update."""
        selection = self.selection
        is_plain = not (self.inside_closure or selection.is_cut or selection.has_doubles)
        return is_plain and supports_fused_override(self.optimizer)
