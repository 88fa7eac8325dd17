"""A scale for learning rates, by incidents and good steps, and its use while an optimizer steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.core.arguments import fraction, open_fraction, whole_number

#: Share of the level at which re-warming begins.
REWARM_START = 0.1


class Backoff:
    """A scale for learning rates: cut at once, re-warmed slowly, raised again after enough good steps.

    The scale is independent of the schedule and multiplies the learning rate that the schedule sets.

    Args:
        factor: A cut multiplies the scale by it; in (0, 1).
        min_scale: Lower bound of every cut; in (0, 1].
        cooldown_steps: Good steps after a cut in which there is no other; 0 or more.
        rewarm_steps: Good steps over which the scale climbs from a tenth of its level to all of it.
        recover_after_steps: Good steps after which the level grows by `1 / factor`, up to 1; at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> backoff = Backoff(factor=0.5, rewarm_steps=0)
        >>> backoff.reduce(), backoff.scale
        (True, 0.5)
    """

    def __init__(
        self,
        factor: float = 0.5,
        min_scale: float = 2**-8,
        cooldown_steps: int = 20,
        rewarm_steps: int = 50,
        recover_after_steps: int = 2000,
    ) -> None:
        self._factor = open_fraction("factor", factor)
        self._min_scale = fraction("min_scale", min_scale)
        self._cooldown_steps = whole_number("cooldown_steps", cooldown_steps, at_least=0)
        self._rewarm_steps = whole_number("rewarm_steps", rewarm_steps, at_least=0)
        self._recover_after_steps = whole_number("recover_after_steps", recover_after_steps)
        self._level = 1.0
        self._good_steps = 0
        self._rewarm_left = 0
        self._cooldown_left = 0

    @property
    def scale(self) -> float:
        """Factor by which learning rates are multiplied now; 1 without an incident."""
        if not self._rewarm_left:
            return self._level
        warmed = 1 - self._rewarm_left / self._rewarm_steps
        return self._level * (REWARM_START + (1 - REWARM_START) * warmed)

    def reduce(self) -> bool:
        """Cuts the scale, and re-warms it from there; at `min_scale` it is only re-warmed.

        Returns:
            True unless the last cut is within the cooldown.
        """
        if self._cooldown_left:
            return False
        self._level = max(self._level * self._factor, self._min_scale)
        self._good_steps = 0
        self._rewarm_left = self._rewarm_steps
        self._cooldown_left = self._cooldown_steps
        return True

    def step(self) -> None:
        """Counts a good step."""
        self._cooldown_left = max(self._cooldown_left - 1, 0)
        self._rewarm_left = max(self._rewarm_left - 1, 0)
        if self._level == 1:
            return
        self._good_steps += 1
        if self._good_steps >= self._recover_after_steps:
            self._level = min(self._level / self._factor, 1.0)
            self._good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the level and the counters."""
        return {
            "level": self._level,
            "good_steps": self._good_steps,
            "rewarm_left": self._rewarm_left,
            "cooldown_left": self._cooldown_left,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self._level = state_dict["level"]
        self._good_steps = state_dict["good_steps"]
        self._rewarm_left = min(state_dict["rewarm_left"], self._rewarm_steps)
        self._cooldown_left = min(state_dict["cooldown_left"], self._cooldown_steps)


class ScaledLearningRate:
    """Multiplies the learning rates of an optimizer by `scale`, only while it steps.

    Schedulers, `LearningRateMonitor` and checkpoints see the scheduled rates. Learning rates that are tensors
    are scaled in place and restored bit for bit.

    Args:
        optimizer: Any torch optimizer.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([weight], lr=1.0)
        >>> rate = ScaledLearningRate(optimizer)
        >>> rate.scale = 0.25
        >>> weight.grad = torch.ones(1)
        >>> optimizer.step()
        >>> weight.item(), optimizer.param_groups[0]["lr"]
        (-0.25, 1.0)
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.scale = 1.0
        self._optimizer = optimizer
        self._scheduled: list[tuple[float | Tensor, float | None]] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._apply),
            optimizer.register_step_post_hook(self._undo),
        ]

    def scheduled(self) -> list[float | Tensor]:
        """The learning rate of each parameter group, as a schedule or the user has set it.

        One that is a tensor is copied, without a host synchronization.
        """
        # Lightning's closure runs within the step, while rates are scaled
        rates = [scheduled for scheduled, _ in self._scheduled] or [
            group["lr"] for group in self._optimizer.param_groups
        ]
        return [rate.detach().clone() if isinstance(rate, Tensor) else float(rate) for rate in rates]

    @property
    def pending(self) -> float:
        """Factor that is still to be put on the rates of the next update; 1 while the optimizer steps."""
        return 1.0 if self._scheduled else self.scale

    def remove(self) -> None:
        """Restores the rates and removes the hooks."""
        self._undo()
        for handle in self._handles:
            handle.remove()

    def _apply(self, *_: Any) -> None:
        # a closure that raised in the step before has skipped the post-hook
        self._undo()
        if self.scale == 1.0:
            return
        for group in self._optimizer.param_groups:
            scheduled = group["lr"]
            if isinstance(scheduled, Tensor):
                self._scheduled.append((scheduled.clone(), None))
                scheduled.mul_(self.scale)
            else:
                group["lr"] = scheduled * self.scale
                self._scheduled.append((scheduled, group["lr"]))

    def _undo(self, *_: Any) -> None:
        for group, (scheduled, scaled) in zip(self._optimizer.param_groups, self._scheduled, strict=False):
            if isinstance(scheduled, Tensor):
                group["lr"].copy_(scheduled)
            elif group["lr"] == scaled:  # else the closure has set a rate of its own
                group["lr"] = scheduled
        self._scheduled = []
