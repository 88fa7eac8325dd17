"""The history of the default clipping policy, and the entry of a step into it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from lightning_gradguard.core.clipping.scalars import Scalar, clamp_min, fmax
from lightning_gradguard.core.detectors.sorted_window import SortedWindow

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
#: Batches of a kind with losses of its own are at least four, and one in sixteen more; of as many last losses
#: one is at most the usual one, as none is where all have risen.
KIND_STEPS, KIND_SHARE = 4, 16
#: First steps of a new task: the level follows the norms, overshoot is not looked for, and a spike is above
#: `max_ratio` times the recent norm.
GRACE = 20
#: Lower bound of divisors.
TINY = 1e-300


class Step(NamedTuple):
    """The numbers of a step, on the host or on the device; rate and weight norm are NaN if there is none."""

    norm: Scalar
    loss: Scalar
    rate: Scalar
    weight_norm: Scalar
    momentum: float


class Decision(NamedTuple):
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


class History:
    """Numbers of past steps, on the host.

    Args:
        window: Steps of which norm and loss are kept.
        state_dict: A saved history, also one of another `window` or of an older version.

    Attributes:
        norms: With at most their bound.
        losses: Without NaN.
        usual_norm: The median of the norms; NaN without any, as the next one.
        usual_loss: The median of the losses.
        unusual: Number of steps that may begin a new task; below 0, of those that are left of its first ones.
        unusual_loss: Loss of the first of them.
        calm_loss: Loss before it.
    """

    def __init__(self, window: int, state_dict: Mapping[str, Any] | None = None) -> None:
        self.seen = 0
        self.level = math.nan
        self.recent = math.nan
        self.lowest_loss = math.inf
        self.highest_loss = math.nan
        self.cap = math.inf
        self.cap_rate = 0.0
        self.alarm = 0
        self.unusual = 0
        self.unusual_loss = 0.0
        self.calm_loss = 0.0
        self.weight_norm = math.nan
        self.steps_since_weights = 0
        saved, known = state_dict or {}, vars(self)
        known |= {name: type(number)(saved.get(name, number)) for name, number in known.items()}
        norms, losses = (map(float, saved.get(name, ())) for name in ("norms", "losses"))
        self.norms = SortedWindow(window, (norm for norm in norms if norm == norm))
        self.losses = SortedWindow(window, (loss for loss in losses if loss == loss))
        self.usual_norm, self.usual_loss = self.norms.median, self.losses.median

    def state_dict(self) -> dict[str, Any]:
        """Returns all numbers but those that follow from others."""
        plain = {name: number for name, number in vars(self).items() if not name.startswith("usual_")}
        return plain | {"norms": list(self.norms.values), "losses": list(self.losses.values)}

    @property
    def recurring_loss(self) -> float:
        """The usual loss, or that of a kind of batches with higher ones, as of a task among others."""
        ordered = self.losses.ordered
        rank = KIND_STEPS + len(ordered) // KIND_SHARE
        if len(ordered) < 2 * rank or min(islice(reversed(self.losses.values), rank)) > self.usual_loss:
            return self.usual_loss
        return ordered[-rank]

    def relief(self, rate: Scalar) -> Scalar:
        """Returns how many times the cap is larger, as the rate is lower than when it was set."""
        has_rate = isinstance(rate, Tensor) or rate == rate
        return fmax(self.cap_rate / clamp_min(rate, TINY), 1.0) if has_rate else 1.0

    def goes_on(self, loss: Scalar) -> Tensor | bool:
        """True if a loss is that of a task which the steps before may have begun."""
        first = self.unusual_loss
        is_near = (loss < TASK_SPREAD * first) & (TASK_SPREAD * loss > first)
        return is_near & (loss > TASK_RISE * self.calm_loss)

    def add(self, step: Step, decision: Decision) -> None:
        """Adds a step, whose numbers the host knows; one that is nonfinite, or of norm 0, is ignored."""
        norm, loss, rate = float(step.norm), float(step.loss), float(step.rate)
        if step.weight_norm == step.weight_norm:
            self.weight_norm = float(step.weight_norm)
        self.steps_since_weights += 1
        if not 0 < norm < math.inf or math.isinf(loss):
            return
        kept, reduced = decision.bound if norm > decision.bound else norm, float(decision.reduced)
        self._follow(loss)
        self.alarm = ALARM_STEPS if decision.has_alarm else max(self.alarm - 1, 0)
        if self.cap < math.inf or reduced < math.inf:
            relief = float(self.relief(rate))
            if norm > relief * self.cap:
                self.cap *= CAP_GROWTH
            if reduced < relief * self.cap:
                self.cap, self.cap_rate = reduced, rate
        if decision.is_new:
            self.norms.clear()
            self.losses.clear()
            kept, self.cap, self.alarm = norm, math.inf, 0
        self.norms.append(kept)
        if loss == loss:
            self.losses.append(loss)
        usual, usual_loss = self.norms.median, self.losses.median
        if self.seen < FIRST_STEPS:
            self.level = usual
        else:
            # of two numbers, the first stays if the other is NaN
            self.level = max(usual if self.unusual < 0 else min(usual, LEVEL_GROWTH * self.level), self.level)
        self.seen += 1
        self.recent = max(float(decision.allowed), RECENT_SHARE * self.recent)
        self.lowest_loss = min(self.lowest_loss, loss)
        self.usual_norm, self.usual_loss = usual, usual_loss
        recurring_loss = self.recurring_loss
        if recurring_loss > max(TASK_RISE * self.highest_loss, usual_loss):
            self.cap, self.alarm = math.inf, 0  # no step of another kind has caused these losses
        self.highest_loss = max(abs(usual_loss), recurring_loss, self.highest_loss)

    def _follow(self, loss: float) -> None:
        """Counts the steps that may begin a new task, or are its first."""
        if self.unusual < 0:
            self.unusual += 1
            return
        if self.unusual > 0 and self.goes_on(loss):
            self.unusual = 1 - GRACE if self.unusual + 1 == TASK_STEPS else self.unusual + 1
            return
        self.unusual = 0
        losses = self.losses
        if losses.ordered and loss > JUMP * losses.ordered[0]:  # else it is no jump from the others either
            last = islice(reversed(losses.values), JUMP_STEPS)
            calm_loss = min(max(map(abs, last)), abs(self.usual_loss))
            if (
                loss > JUMP * calm_loss
                and loss > NOTABLE * self.highest_loss
                and self.recent <= CALM_RATIO * max(self.level, self.usual_norm)
                and self.seen >= FIRST_STEPS
                and self.alarm == 0
            ):
                self.unusual, self.unusual_loss, self.calm_loss = 1, loss, calm_loss
