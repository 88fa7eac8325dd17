"""The history of the default clipping policy, and the entry of a step into it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from statistics import median_low
from typing import Any

from torch import Tensor

from lightning_gradguard.core.clipping.scalars import Scalar, clamp_min, fmax

#: Steps in which the level follows the norms freely, and overshoot is found earlier.
FIRST_STEPS = 20
#: Largest growth of the level in one step: doubling takes 139 steps.
LEVEL_GROWTH = 1.005
#: A norm is no spike up to this multiple of the largest recent one, as where a plateau is left; with each
#: later step a norm counts as this share of itself.
RECENT_RATIO, RECENT_SHARE = 3.0, 0.9
#: A norm above its bound is clipped only beyond this multiple of it, while the loss is at most twice the
#: usual one.
CALM_RATIO = 3.0
#: Steps without overshoot after which it is again looked for as before any.
ALARM_STEPS = 60
#: Growth of the cap in each step that it bounds.
CAP_GROWTH = 1.02
#: A loss this many times all of the last ones, or the usual one, jumps, as where a new task begins.
JUMP, JUMP_STEPS = 5.0, 10
#: A loss below this share of the highest usual one is no new task, but noise of a task that is learned.
NOTABLE = 0.1
#: Steps in a row with a loss this many times that before the jump are a new task, and the factor between
#: their losses.
TASK_STEPS, TASK_RISE, TASK_SPREAD = 3, 2.0, 20.0
#: First steps of a new task: the level follows the norms, overshoot is not looked for, and a spike is above
#: `max_ratio` times the recent norm.
GRACE = 20
#: Lower bound of divisors.
TINY = 1e-300
#: Medians of the windows, which a checkpoint does not hold.
_DERIVED = ("usual_norm", "usual_loss")


@dataclass(frozen=True, slots=True)
class Step:
    """The numbers of a step, on the host or on the device; rate and weight norm are NaN if there is none."""

    norm: Scalar
    loss: Scalar
    rate: Scalar
    weight_norm: Scalar
    momentum: float


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision on a step, on the host or on the device.

    Args:
        bound: Largest norm that is no spike.
        allowed: The norm after clipping.
        cap: Bound of the norm by overshoot, in this step or an earlier one.
        reduced: The former.
        has_alarm: True if an alarm begins, or goes on as the step overshoots.
        is_new: True if the step makes a new task.
    """

    bound: float
    allowed: Scalar
    cap: Scalar
    reduced: Scalar
    has_alarm: Tensor | bool
    is_new: Tensor | bool


@dataclass(frozen=True, slots=True)
class History:
    """Numbers of the host, which are never written to.

    `unusual` counts the steps that may begin a new task, and below 0 those that are left of its first ones;
    `unusual_loss` is the loss of the first, `calm_loss` that before it.
    """

    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seen: int = 0
    level: float = math.nan
    recent: float = math.nan
    lowest_loss: float = math.inf
    highest_loss: float = math.nan
    cap: float = math.inf
    cap_rate: float = 0.0
    alarm: int = 0
    unusual: int = 0
    unusual_loss: float = 0.0
    calm_loss: float = 0.0
    weight_norm: float = math.nan
    steps_since_weights: int = 0
    usual_norm: float = math.nan
    usual_loss: float = math.nan

    def state_dict(self) -> dict[str, Any]:
        """Returns all numbers but those that follow from others."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _DERIVED}

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any], window: int) -> History:
        """Returns a saved history, also one of another `window`."""
        known = {f.name: getattr(cls(), f.name) for f in fields(cls)}
        values: dict[str, Any] = {
            name: type(number)(state_dict[name])
            for name, number in known.items()
            if name in state_dict and name not in ("norms", "losses")
        }
        for name, usual in (("norms", "usual_norm"), ("losses", "usual_loss")):
            numbers = [float(number) for number in state_dict.get(name, ())]
            values[name] = [number for number in numbers if number == number][-window:]
            values[usual] = _median(values[name])
        return cls(**values)

    def relief(self, rate: Scalar) -> Scalar:
        """Returns how many times the cap is larger, as the rate is lower than when it was set."""
        has_rate = isinstance(rate, Tensor) or rate == rate
        return fmax(self.cap_rate / clamp_min(rate, TINY), 1.0) if has_rate else 1.0

    def goes_on(self, loss: Scalar) -> Tensor | bool:
        """True if a loss is that of a task which the steps before may have begun."""
        first = self.unusual_loss
        is_near = (loss < TASK_SPREAD * first) & (TASK_SPREAD * loss > first)
        return is_near & (loss > TASK_RISE * self.calm_loss)

    def updated(self, step: Step, decision: Decision, window: int) -> History:
        """Returns the history with a step in it, whose numbers the host knows."""
        norm, loss, rate = float(step.norm), float(step.loss), float(step.rate)
        weight_norm, steps = float(step.weight_norm), self.steps_since_weights + 1
        if math.isnan(weight_norm):
            weight_norm = self.weight_norm
        if not norm < math.inf or math.isinf(loss):
            return replace(self, weight_norm=weight_norm, steps_since_weights=steps)
        norms, losses, cap, cap_rate = self.norms, self.losses, self.cap, self.cap_rate
        unusual, unusual_loss, calm_loss = self._followed(loss)
        alarm = ALARM_STEPS if decision.has_alarm else max(self.alarm - 1, 0)
        reduced, kept = float(decision.reduced), decision.bound if norm > decision.bound else norm
        if cap < math.inf or reduced < math.inf:
            relief = float(self.relief(rate))
            if norm > relief * cap:
                cap *= CAP_GROWTH
            if reduced < relief * cap:
                cap, cap_rate = reduced, rate
        if decision.is_new:
            norms, losses, kept, cap, alarm = [], [], norm, math.inf, 0
        norms = [*norms, kept][-window:]
        if loss == loss:
            losses = [*losses, loss][-window:]
        usual, usual_loss = _median(norms), _median(losses)
        # of two numbers, the first stays if the other is NaN
        level = max(usual if unusual < 0 else min(usual, LEVEL_GROWTH * self.level), self.level)
        return History(
            norms=norms,
            losses=losses,
            seen=self.seen + 1,
            level=usual if self.seen < FIRST_STEPS else level,
            recent=max(float(decision.allowed), RECENT_SHARE * self.recent),
            lowest_loss=min(self.lowest_loss, loss),
            highest_loss=max(abs(usual_loss), self.highest_loss),
            cap=cap,
            cap_rate=cap_rate,
            alarm=alarm,
            unusual=unusual,
            unusual_loss=unusual_loss,
            calm_loss=calm_loss,
            weight_norm=weight_norm,
            steps_since_weights=steps,
            usual_norm=usual,
            usual_loss=usual_loss,
        )

    def _followed(self, loss: float) -> tuple[int, float, float]:
        """Returns `unusual`, `unusual_loss` and `calm_loss` after a step."""
        unusual, before = self.unusual + 1, (self.unusual_loss, self.calm_loss)
        if self.unusual < 0:
            return unusual, *before
        if self.unusual > 0 and self.goes_on(loss):
            return (1 - GRACE if unusual == TASK_STEPS else unusual), *before
        calm_loss = min(max(map(abs, self.losses[-JUMP_STEPS:]), default=math.nan), abs(self.usual_loss))
        begins = (
            loss > JUMP * calm_loss
            and loss > NOTABLE * self.highest_loss
            and self.recent <= CALM_RATIO * max(self.level, self.usual_norm)
            and self.seen >= FIRST_STEPS
            and self.alarm == 0
        )
        return (1, loss, calm_loss) if begins else (0, *before)


def _median(numbers: list[float]) -> float:
    """Returns the median, the lower of two; NaN without a number."""
    return median_low(numbers) if numbers else math.nan
