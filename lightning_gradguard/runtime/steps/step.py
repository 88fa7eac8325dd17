"""An optimizer step between measuring and stepping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core.norms import Gradients, Measurement
from lightning_gradguard.runtime.fused_optimizer import supports_fused_override
from lightning_gradguard.runtime.steps.measuring import Numbers
from lightning_gradguard.runtime.steps.parameters import Selection

#: `"accept"`: the step may enter histories. `"drop"`: it must not happen. `"ignore"`: it enters no history,
#: and somebody else (the GradScaler) sees to it.
Verdict = Literal["accept", "drop", "ignore"]


@dataclass
class Step:
    """An optimizer step between measuring and stepping.

    Args:
        optimizer: The optimizer about to step.
        optimizer_index: Its position in `trainer.optimizers`.
        gradients: Measured before anybody wrote.
        selection: The parameters that were measured.
        tensor_norms: Norm of each gradient by `norm_type`.
        weight_norms: L2 norm of each weight before the step, if a callback asked for it.
        is_judged: Whether somebody judges it, now or before the next step.
        numbers: What judges go by, on the device.
        measurement: The numbers on the host; `None` if nobody judges, or not before the next step.
        verdict: What every callback and rank goes by; `"accept"` while the judges wait.
        inside_closure: Whether the optimizer evaluates several times in one step (LBFGS): callbacks
            then only watch.
    """

    optimizer: Optimizer
    optimizer_index: int
    gradients: Gradients
    selection: Selection
    tensor_norms: Mapping[float, Tensor]
    weight_norms: Tensor | None
    is_judged: bool
    numbers: Numbers
    measurement: Measurement | None
    verdict: Verdict
    inside_closure: bool

    @property
    def accepted(self) -> bool:
        """Whether the step may enter histories."""
        return self.verdict == "accept"

    @property
    def loss(self) -> Tensor:
        """Mean loss of the step, a scalar on the device."""
        return self.numbers.mean_loss()

    @property
    def supports_fused_override(self) -> bool:
        """Whether the optimizer's own kernel can scale the gradients (in float32), or skip the update."""
        selection = self.selection
        alone = self.inside_closure or selection.is_cut or selection.has_doubles
        return not alone and supports_fused_override(self.optimizer)
