"""A scale for learning rates, by incidents and good steps, and its use while an optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import fmean, median
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.core.arguments import whole_number, within
from lightning_gradguard.core.incidents import TRIAL_STEPS

#: Share of the level at which re-warming begins.
REWARM_START = 0.1
#: A search ends when the level that trains is at least this share of the lowest one that failed.
SEARCH_PRECISION = 1 / 16
#: Squarings by which a search is ahead whose run has diverged from its very first step.
AHEAD = 2
#: Losses at the beginning of a trial, and at its end, whose medians are compared.
COMPARED_LOSSES = 10
#: Losses after the rollback of a divergence, and the share of its loss from which on others are as high.
RETURN_AFTER, AS_HIGH = 3, 0.85


class Backoff:
    """A scale for learning rates: cut at once, re-warmed slowly, raised again after enough good steps.

    The scale is independent of the schedule and multiplies the learning rate that the schedule sets.

    A run that is rolled back to where it began, or to where it was rolled back to before, has a rate that
    does not train it. Then the scale is *searched*: each cut is the square of the one before (1/2, 1/4, 1/16,
    ...; from 1/16 on where the run has diverged from its first step), and a level that lasts for 60 good
    steps is raised to the geometric mean of itself and the lowest level that has failed, until they are
    within a factor of 16. What was found is kept, and recovers no further.

    A cut for a divergence is taken back if the next losses are as high: with earlier weights, that is due to
    the data.

    Args:
        factor: A cut multiplies the scale by it; in (0, 1).
        min_scale: Lower bound of every cut; in (0, 1].
        cooldown_steps: Good steps after a cut in which there is no other, unless the scale is searched; 0 or
            more.
        rewarm_steps: Good steps over which the scale climbs from a tenth of its level to all of it, unless it
            is searched.
        recover_after_steps: Good steps after which the level grows by `1 / factor`, up to 1 or what a search
            has found; at least 1.

    Attributes:
        has_found: True if the last good step has ended a search with a level at which the loss has fallen.
        has_returned: True if the last good step has taken a cut back.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> backoff = Backoff(factor=0.5, rewarm_steps=0)
        >>> backoff.reduce(), backoff.scale
        (True, 0.5)
        >>> backoff.reduce(search=True), backoff.reduce(search=True), backoff.scale
        (True, True, 0.0625)
    """

    def __init__(
        self,
        factor: float = 0.5,
        min_scale: float = 2**-20,
        cooldown_steps: int = 20,
        rewarm_steps: int = 50,
        recover_after_steps: int = 2000,
    ) -> None:
        self._factor = within("factor", factor, "(0, 1)")
        self._min_scale = within("min_scale", min_scale, "(0, 1]")
        self._cooldown_steps = whole_number("cooldown_steps", cooldown_steps, at_least=0)
        self._rewarm_steps = whole_number("rewarm_steps", rewarm_steps, at_least=0)
        self._recover_after_steps = whole_number("recover_after_steps", recover_after_steps)
        self._returned_to = -1
        self.reset()

    def begin(self, position: int) -> None:
        """Begins a run: a rollback to its start searches the scale.

        Args:
            position: Step, or any number that grows from snapshot to snapshot, at which the run begins.
        """
        self._returned_to = position

    def reset(self) -> None:
        """Forgets every cut, as if the rates had been chosen anew."""
        self._level = 1.0
        self._ceiling = 1.0
        self._failed = 1.0
        self._trained = 0.0
        self._cuts = 0
        self._losses: list[float] = []
        self._good_steps = 0
        self._rewarm_left = 0
        self._cooldown_left = 0
        self._before_cut: dict[str, Any] = {}
        self._risen_loss, self._later_losses = math.inf, list[float]()
        self.has_found = self.has_returned = False

    @property
    def needs_loss(self) -> bool:
        """True if `step` must be given the loss."""
        return self.is_searching or bool(self._before_cut)

    @property
    def level(self) -> float:
        """The scale once it is re-warmed."""
        return self._level

    @property
    def is_searching(self) -> bool:
        """True until a level that trains is found."""
        return self._cuts > 0

    @property
    def scale(self) -> float:
        """Factor by which learning rates are multiplied now; 1 without an incident."""
        if not self._rewarm_left:
            return self._level
        warmed = 1 - self._rewarm_left / self._rewarm_steps
        return self._level * (REWARM_START + (1 - REWARM_START) * warmed)

    def on_rollback(self, position: int, *, has_diverged: bool = False, risen_loss: float = math.inf) -> bool:
        """Cuts the scale; searches it if the run was rolled back to here or before already, or began here.

        Args:
            position: That of the snapshot, as in `begin`.
            has_diverged: True if the weights were bad, and not a step alone.
            risen_loss: That of a divergence.

        Returns:
            True unless the last cut is within the cooldown.
        """
        before, search = self.state_dict(), position <= self._returned_to
        self._returned_to = position
        is_from_start = search and position == 0
        if is_from_start and has_diverged:
            self._cuts = max(self._cuts, AHEAD)  # half of such a rate seldom trains
        # a rate that fails at once is tried as it is: re-warming would hide that it fails
        is_cut = self.reduce(search=search, rewarm=not is_from_start)
        self._before_cut = before if is_cut and risen_loss < math.inf else {}
        self._risen_loss, self._later_losses = risen_loss, list[float]()
        return is_cut

    def reduce(self, *, search: bool = False, rewarm: bool = True) -> bool:
        """Cuts the scale; at `min_scale` it is only re-warmed.

        Args:
            search: True if the rate does not train the run.
            rewarm: False if the optimizer has no moments of earlier steps.

        Returns:
            True unless the last cut is within the cooldown.
        """
        search = search or self.is_searching
        if self._cooldown_left and not search:
            return False
        self._losses = []
        self._failed = self._level
        if search and 0 < self._trained < self._level:
            self._level = self._trained  # a level that was raised too far
        else:
            self._trained = 0.0
            self._level = max(self._level * self._factor ** (2**self._cuts), self._min_scale)
            self._cuts += search
        self._good_steps = 0
        self._rewarm_left = self._rewarm_steps if rewarm and self._cuts < 2 else 0
        self._cooldown_left = self._cooldown_steps
        return True

    def step(self, loss: float | None = None) -> None:
        """Counts a good step; its loss is asked for if `needs_loss`."""
        self._cooldown_left = max(self._cooldown_left - 1, 0)
        self._rewarm_left = max(self._rewarm_left - 1, 0)
        self.has_found = self.has_returned = False
        if self._before_cut and loss is not None:
            self._later_losses.append(loss)
            if len(self._later_losses) == RETURN_AFTER:
                before, self._before_cut = self._before_cut, {}
                if fmean(self._later_losses) >= AS_HIGH * self._risen_loss:
                    self.load_state_dict(before)
                    self.has_returned = True
        if self._level >= self._ceiling:
            return
        self._good_steps += 1
        if self.is_searching:
            if loss is not None:
                self._losses.append(loss)
            if self._good_steps >= TRIAL_STEPS:
                self._end_trial()
        elif self._good_steps >= self._recover_after_steps:
            self._level = min(self._level / self._factor, self._ceiling)
            self._good_steps = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the level, what a search knows, and the counters."""
        return {
            "level": self._level,
            "ceiling": self._ceiling,
            "failed": self._failed,
            "trained": self._trained,
            "cuts": self._cuts,
            "losses": list(self._losses),
            "good_steps": self._good_steps,
            "rewarm_left": self._rewarm_left,
            "cooldown_left": self._cooldown_left,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state; that of version 0.5 has no search."""
        self._level = state_dict["level"]
        self._ceiling = state_dict.get("ceiling", 1.0)
        self._failed = state_dict.get("failed", 1.0)
        self._trained = state_dict.get("trained", 0.0)
        self._cuts = state_dict.get("cuts", 0)
        self._losses = list(state_dict.get("losses", ()))
        self._good_steps = state_dict["good_steps"]
        self._rewarm_left = min(state_dict["rewarm_left"], self._rewarm_steps)
        self._cooldown_left = min(state_dict["cooldown_left"], self._cooldown_steps)

    def _end_trial(self) -> None:
        """Raises the level that has lasted, or ends the search if it is close to one that failed."""
        losses, self._losses, self._good_steps = self._losses, [], 0
        self._trained = self._level
        if self._level >= self._failed * SEARCH_PRECISION:
            if self._cuts > 1:  # one cut may have been for a fault of one step
                has_fallen = bool(losses) and median(losses[-COMPARED_LOSSES:]) < median(
                    losses[:COMPARED_LOSSES]
                )
                self._ceiling, self.has_found = self._level, has_fallen
            self._cuts = 0
        else:
            self._level = math.sqrt(self._level * self._failed)


class ScaledLearningRate:
    """Multiplies the learning rates of an optimizer by `scale`, only while it steps.

    Schedulers, `LearningRateMonitor` and checkpoints see the scheduled rates. Learning rates that are tensors
    are scaled in place and restored bit for bit. Several on one optimizer multiply.

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
        self._hooks = _rate_hooks(optimizer) or _RateHooks(optimizer)
        self._hooks.scaled.append(self)

    def scheduled(self) -> list[float | Tensor]:
        """Returns the learning rates of groups that have one, as a schedule or the user has set them.

        One that is a tensor is copied, without a host synchronization.
        """
        return self._hooks.scheduled()

    @property
    def of_all(self) -> float:
        """The factor of all that scale the rates of the optimizer."""
        return self._hooks.factor

    def initial(self) -> list[float]:
        """Returns the learning rate of each parameter group before any schedule; synchronizes for tensors."""
        pairs = zip(self._hooks.groups(), self.scheduled(), strict=True)
        return [float(group.get("initial_lr", rate)) for group, rate in pairs]

    def remove(self) -> None:
        """Restores the rates, and removes the hooks if no other needs them."""
        self._hooks.remove(self)


def pending_rate_scale(optimizer: Optimizer) -> float:
    """Returns the factor that is still to be put on the rates of the next update; 1 while it steps."""
    hooks = _rate_hooks(optimizer)
    return 1.0 if hooks is None or hooks._scheduled else hooks.factor


def groups_with_rate(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Returns the parameter groups with a learning rate; it is `None` for relative steps, as of Adafactor."""
    return [group for group in optimizer.param_groups if group.get("lr") is not None]


def total_rate(optimizer: Optimizer) -> float | Tensor:
    """Returns the learning rates of the next update, added up; 0 for an optimizer without one."""
    rates: Iterable[float | Tensor] = (group["lr"] for group in groups_with_rate(optimizer))
    return sum(rates) * pending_rate_scale(optimizer)


class _RateHooks:
    """The hooks of all that scale the learning rates of one optimizer."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.scaled: list[ScaledLearningRate] = []
        self._scheduled: list[tuple[float | Tensor, float | None]] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._apply),
            optimizer.register_step_post_hook(self._undo),
        ]

    def groups(self) -> list[dict[str, Any]]:
        # an optimizer of the user's own may have no rate, or another name for it
        return groups_with_rate(self.optimizer)

    @property
    def factor(self) -> float:
        factor = 1.0
        for rate in self.scaled:
            factor *= rate.scale
        return factor

    def scheduled(self) -> list[float | Tensor]:
        # Lightning's closure runs within the step, while rates are scaled
        rates = [scheduled for scheduled, _ in self._scheduled] or [group["lr"] for group in self.groups()]
        return [rate.detach().clone() if isinstance(rate, Tensor) else float(rate) for rate in rates]

    def remove(self, rate: ScaledLearningRate) -> None:
        self._undo()
        if rate in self.scaled:
            self.scaled.remove(rate)
        if not self.scaled:
            for handle in self._handles:
                handle.remove()

    def _apply(self, *_: Any) -> None:
        if self._scheduled:  # a closure that raised in the step before has skipped the post-hook
            self._undo()
        factor = self.factor
        if factor == 1.0:
            return
        for group in self.groups():
            scheduled = group["lr"]
            if isinstance(scheduled, Tensor):
                self._scheduled.append((scheduled.clone(), None))
                scheduled.mul_(factor)
            else:
                group["lr"] = scheduled * factor
                self._scheduled.append((scheduled, group["lr"]))

    def _undo(self, *_: Any) -> None:
        if not self._scheduled:
            return
        for group, (scheduled, scaled) in zip(self.groups(), self._scheduled, strict=False):
            if isinstance(scheduled, Tensor):
                group["lr"].copy_(scheduled)
            elif group["lr"] == scaled:  # else the closure has set a rate of its own
                group["lr"] = scheduled
        self._scheduled = []


def _rate_hooks(optimizer: Optimizer) -> _RateHooks | None:
    """Returns the hooks that are registered on an optimizer."""
    for hook in optimizer._optimizer_step_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, _RateHooks):
            return owner
    return None
