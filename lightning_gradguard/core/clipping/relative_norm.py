"""The default clipping policy: bounds relative to the run's own norms, losses and weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from lightning_gradguard.core.arguments import positive, whole_number
from lightning_gradguard.core.clipping.policy import ClippingPolicy
from lightning_gradguard.core.clipping.scalars import (
    Recent,
    Scalar,
    absolute,
    as_like,
    clamp_min,
    emptied,
    fmax,
    fmin,
    last,
    median,
    negate,
    pushed,
    recent_like,
    square_root,
    where,
)
from lightning_gradguard.core.norms import Gradients, StepContext

#: Steps in which the level follows the norms freely, and overshoot is found earlier.
FIRST_STEPS = 20
#: Largest growth of the level in one step: doubling takes 139 steps.
LEVEL_GROWTH = 1.005
#: A norm is no spike up to this multiple of the level, however small norms have become since.
LEVEL_RATIO = 3.0
#: A norm is no spike up to this multiple of the largest recent one, as where a plateau is left; with each
#: later step a norm counts as this share of itself.
RECENT_RATIO, RECENT_SHARE = 3.0, 0.9
#: A norm above its bound is clipped only beyond this multiple of it, while the loss is at most twice the
#: usual one.
CALM_RATIO = 3.0
#: A step whose predicted decrease is below this share of the usual loss is harmless.
HARMLESS = 0.5
#: Under optimizers that normalize gradients, a norm this many times the level is a spike if the loss is as
#: many times the usual one.
ADAPTIVE_RATIO = 3.0
#: A loss this many times the highest level so far, times 1 + momentum / 2, has risen: a healthy run swings
#: with momentum.
RISE = 1.2
#: Ratio of predicted decrease and loss at which a step overshoots: with momentum accumulated, if the loss has
#: risen; and without, if it has not, in the first steps and later.
OVERSHOOT, OVERSHOOT_EARLY, OVERSHOOT_LATER = 4.0, 16.0, 32.0
#: The ratio to which an overshooting step is reduced.
REDUCED = 0.5
#: Ratio from which a step that is longer than the weights is reduced, and its length then, by weight norm.
OUT_OF_REGION, REGION = 2.0, 0.02
#: Steps without overshoot after which it is again looked for as before any.
ALARM_STEPS = 300.0
#: Growth of the cap in each step that it bounds.
CAP_GROWTH = 1.02
#: A loss this many times the usual one and that of the last step jumps, as where a new task begins.
JUMP = 5.0
#: A loss below this share of the highest usual one is no new task, but noise of a task that is learned.
NOTABLE = 0.1
#: Steps in a row with a spike or a risen loss that are a new task, and the factor between their losses.
TASK_STEPS, TASK_SPREAD = 3.0, 20.0
#: First steps of a new task: the level follows the norms, overshoot is not looked for, and a spike is above
#: `max_ratio` times the recent norm.
GRACE = 20.0
#: Steps between two measurements of the weights.
WEIGHTS_EVERY = 50
#: Lower bound of the weight norm and of divisors.
_SMALL, _TINY = 1e-3, 1e-300


@dataclass(slots=True)
class _State:
    """The history, which is never written to; numbers are all on the host or all on the device.

    `unusual` counts the steps that may begin a new task; below 0, those that are left of its first ones.
    """

    norms: Recent
    losses: Recent
    seen: Scalar = 0.0
    level: Scalar = math.nan
    recent: Scalar = math.nan
    lowest_loss: Scalar = math.inf
    highest_loss: Scalar = math.nan
    cap: Scalar = math.inf
    cap_rate: Scalar = 0.0
    alarm: Scalar = 0.0
    unusual: Scalar = 0.0
    unusual_loss: Scalar = 0.0
    weight_norm: Scalar = math.nan
    steps_since_weights: int = 0
    usual_norm: Scalar = math.nan
    usual_loss: Scalar = math.nan

    def like(self, norm: Scalar, window: int) -> _State:
        """Returns the state in the form of a norm."""
        if not isinstance(norm, Tensor) and not isinstance(self.level, Tensor):
            return self
        values: dict[str, Any] = {key: recent_like(norm, getattr(self, key), window) for key in _WINDOWS}
        values |= {key: as_like(norm, getattr(self, key)) for key in _NUMBERS}
        return replace(self, **values)


_WINDOWS = ("norms", "losses")
_NUMBERS = (
    *("seen", "level", "recent", "lowest_loss", "highest_loss", "cap", "cap_rate", "alarm", "weight_norm"),
    *("unusual", "unusual_loss", "usual_norm", "usual_loss"),
)
#: Medians of the windows, which a checkpoint does not hold.
_DERIVED = ("usual_norm", "usual_loss")


class RelativeNormClipping(ClippingPolicy):
    """Clips a norm that stands out from the run's own, or whose step overshoots; the default policy.

    There is no absolute bound. Usual norm and loss are medians of the last `window` steps; a norm enters
    with at most its bound. The *level* is the highest usual norm so far; after the first 20 steps it grows
    by at most 0.5 % a step, so that a slow explosion is not followed.

    **Spikes**, under every optimizer, rise at once: a norm above its bound, the largest of `max_ratio`
    times the usual one, 3 times the level and 3 times the *recent* one, is clipped to the level; up to 3
    times the bound only if the loss is more than twice the usual one, and under SGD not if the step is
    harmless (*p* < 0.5, see below). The recent norm is the largest after clipping, 10 % less with each
    later step: norms that rise step by step, as where a plateau is left, are no spikes. Under SGD without
    the overshoot rule, the usual norm counts as at most the level, and so does the recent one unless the
    loss is at most the usual one. Under any other optimizer, while no loss was negative, a norm above 3
    times the level with a loss above 3 times the usual one is a spike too.

    **Overshoot**, under SGD while no loss was negative: *p = rate × norm² / loss* compares the decrease that
    a step along the gradient promises with the loss, where *rate* is the learning rate divided by 1 -
    momentum, and *loss* that of the step, at least the usual and at most the highest usual one. On a
    quadratic with minimum 0, plain SGD overshoots above 4. An *alarm* begins at *p* > 4 with a loss 1.2 (1
    + momentum / 2) times the highest usual one; or, with the learning rate times 1 + momentum as *rate*, at
    *p* > 16 in the first 20 steps, and at *p* > 32 later. It ends 300 steps after the last overshoot. Until
    then a step with *p* > 4 is reduced to *p* = 0.5, and one with *p* > 2 that is longer than the norm of
    the weights to 0.02 of it. The reduced norm is the *cap* of later ones; it grows by 2 % with each step
    that it bounds, and is as many times larger as the learning rate is lower than when it was set.

    **A new task**, as in a curriculum or on other data, is no explosion: three steps in a row that are
    spikes, or have a loss above twice the usual one, all within 20 times the loss of the first. The loss of
    the first is 5 times the usual one and that of the step before, and at least a tenth of the highest usual
    one, after recent norms of at most 3 times the usual ones: such a jump was not caused by the steps
    before. Under SGD it may be any spike. Usual norm and loss are then those of the new task, the cap is
    lifted, and for 20 steps the level follows the norms, overshoot is not looked for, and only norms above
    `max_ratio` times the recent one are spikes. No new task begins in the first 20 steps, or in an alarm.

    Without a loss, or after a negative one, only spikes are clipped. The norm of the weights is measured
    once in 50 steps. A nonfinite norm or loss changes nothing.

    Args:
        max_ratio: Of a norm to the usual one; positive.
        window: Number of past steps for the usual norm and loss; at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> from lightning_gradguard.core.norms import measure_gradients
        >>> weight, policy = torch.nn.Parameter(torch.zeros(2)), RelativeNormClipping()
        >>> for norm in [1.0, 1.2, 0.9, 5.0, 50.0]:
        ...     weight.grad = torch.tensor([norm, 0.0])
        ...     print(round(float(policy.coefficients(measure_gradients([("weight", weight)]))), 3))
        ...     policy.commit()
        1.0
        1.0
        1.0
        1.0
        0.02

    References:
        The ratio p is the inverse of a step size of Polyak, Introduction to Optimization, 1987; the bound on
        the step by the norm of the weights is that of You, Gitman, Ginsburg, Large Batch Training of
        Convolutional Networks, 2017, arXiv:1708.03888; the bound on growth is akin to that of Chen et al.,
        Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?, 2024, arXiv:2410.01623.
        The constants are measured, see docs/evidence.md.
    """

    def __init__(self, max_ratio: float = 10.0, window: int = 100) -> None:
        self.max_ratio = positive("max_ratio", max_ratio)
        self.window = whole_number("window", window)
        self._state = _State([], [])
        self._pending: tuple[_State, Scalar, Scalar, Scalar, Scalar, Scalar, Tensor | bool]
        self._uses_weights = True
        self.wants_weight_norm = True

    def coefficients(self, gradients: Gradients) -> Scalar:
        """Returns one coefficient, by the spike rule and the overshoot rule."""
        context = gradients.context or StepContext()
        rate = context.learning_rate
        self._uses_weights = rate is not None
        norm: Scalar = gradients.total_norm
        if gradients.known_norm is not None and not isinstance(rate, Tensor):
            norm = gradients.known_norm
        state, loss = self._state.like(norm, self.window), as_like(norm, context.loss)
        if context.weight_norm is not None:
            state = replace(state, weight_norm=as_like(norm, context.weight_norm))
        is_finite = (norm < math.inf) & (abs(loss) != math.inf)
        usual, usual_loss, recent = state.usual_norm, state.usual_loss, state.recent
        if rate is not None or gradients.context is None:
            # where the overshoot rule is at work, it bounds the growth, and a change of level is followed
            has_loss = fmin(state.lowest_loss, loss) >= 0
            can_overshoot = has_loss & (loss == loss) & (rate is not None)
            usual = where(can_overshoot, usual, fmin(usual, state.level))
            recent = where(can_overshoot | (loss <= usual_loss), recent, usual)
        bound = fmax(fmax(self.max_ratio * usual, LEVEL_RATIO * state.level), RECENT_RATIO * recent)
        usual_size = absolute(usual_loss)
        is_calm = (loss <= usual_loss + usual_size) & (norm <= CALM_RATIO * bound)
        is_spike = (norm > bound) & negate(is_calm)
        if rate is None:
            is_ratio = fmin(state.lowest_loss, loss) >= 0  # losses around 0 have no ratio
            rises = is_ratio & (loss > ADAPTIVE_RATIO * usual_loss)
            is_spike = is_spike | ((norm > ADAPTIVE_RATIO * state.level) & rises)
        else:
            decrease = rate / (1 - context.momentum) * norm * norm
            is_spike = is_spike & negate(decrease < HARMLESS * usual_loss)
        if isinstance(norm, Tensor) or is_spike or state.unusual != 0 or loss > JUMP * usual_size:
            state = _followed(state, loss, usual_size, is_spike, is_finite, rate is not None)
        stands_out = (state.unusual > -GRACE) & (norm > self.max_ratio * recent)
        is_spike = is_spike & ((state.unusual >= 0) | stands_out)
        allowed = where(is_spike, fmin(state.level, norm), norm)
        relief: Scalar = 1.0
        if rate is not None:
            one = as_like(norm, 1.0)
            relief = fmax(state.cap_rate / clamp_min(rate, _TINY), one)
        cap, alarm = where(norm > relief * state.cap, CAP_GROWTH * state.cap, state.cap), state.alarm
        if rate is not None:
            reduced, alarm = _overshoot(state, allowed, loss, usual_loss, rate, context.momentum)
            is_lower, rate = reduced < relief * cap, as_like(norm, rate)
            cap, relief = where(is_lower, reduced, cap), where(is_lower, one, relief)
            state = replace(state, cap_rate=where(is_lower & is_finite, rate, state.cap_rate))
        allowed = fmin(allowed, relief * cap)
        self.threshold = fmin(bound, relief * cap)
        self._pending = state, cap, alarm, allowed, fmin(norm, bound), loss, is_finite
        return where((norm > allowed) & is_finite, allowed / clamp_min(norm, _TINY), 1.0)

    def commit(self) -> None:
        """Adds the step that `coefficients` saw last to the history.

        The norm of the weights is wanted once in 50 steps, under an optimizer whose steps are along the
        gradient.
        """
        self._state = self._updated(*self._pending)
        self.wants_weight_norm = self._uses_weights and self._state.steps_since_weights % WEIGHTS_EVERY == 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the history."""
        names = [field.name for field in fields(_State) if field.name not in _DERIVED]
        return {name: getattr(self._state, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved history, also one of another `window`."""
        self._state = _State([], [])
        if state_dict:
            norms, losses = (recent_like(0.0, state_dict[key], 0)[-self.window :] for key in _WINDOWS)
            usual = {"usual_norm": median(norms), "usual_loss": median(losses)}
            self._state = _State(**{**state_dict, "norms": norms, "losses": losses, **usual})
        self.wants_weight_norm = self._uses_weights and self._state.steps_since_weights % WEIGHTS_EVERY == 0

    def _updated(
        self,
        state: _State,
        cap: Scalar,
        alarm: Scalar,
        allowed: Scalar,
        kept: Scalar,
        loss: Scalar,
        is_finite: Tensor | bool,
    ) -> _State:
        """Returns the history with this step in it."""
        norms = pushed(state.norms, kept, is_finite, self.window)
        losses = pushed(state.losses, loss, is_finite & (loss == loss), self.window)
        usual, usual_loss = median(norms), median(losses)
        highest = fmax(state.level, fmin(usual, LEVEL_GROWTH * state.level))
        level = where(state.unusual < 0, fmax(state.level, usual), highest)
        level = where(state.seen < FIRST_STEPS, usual, level)
        return _State(
            norms=norms,
            losses=losses,
            seen=state.seen + is_finite,
            level=where(is_finite, level, state.level),
            recent=where(is_finite, fmax(RECENT_SHARE * state.recent, allowed), state.recent),
            lowest_loss=where(is_finite, fmin(state.lowest_loss, loss), state.lowest_loss),
            highest_loss=fmax(state.highest_loss, absolute(usual_loss)),
            unusual=state.unusual,
            unusual_loss=state.unusual_loss,
            cap=where(is_finite, cap, state.cap),
            cap_rate=state.cap_rate,
            alarm=where(is_finite, alarm, state.alarm),
            weight_norm=state.weight_norm,
            steps_since_weights=state.steps_since_weights + 1,
            usual_norm=usual,
            usual_loss=usual_loss,
        )


def _followed(
    state: _State,
    loss: Scalar,
    usual: Scalar,
    is_spike: Tensor | bool,
    is_finite: Tensor | bool,
    has_rate: bool,
) -> _State:
    """Returns the state after a look for a new task, without usual norm and loss where one has begun.

    `usual` is the size of the usual loss.
    """
    is_calm = state.recent <= CALM_RATIO * fmax(state.level, state.usual_norm)
    is_notable = (loss > NOTABLE * state.highest_loss) & (loss > JUMP * absolute(last(state.losses)))
    jumps = is_calm & (loss > JUMP * usual) & is_notable
    begins = ((is_spike & has_rate) | jumps) & (state.seen >= FIRST_STEPS) & (state.alarm == 0)
    first, size = absolute(state.unusual_loss), absolute(loss)
    is_near = (size < TASK_SPREAD * first) & (TASK_SPREAD * size > first)
    goes_on = (state.unusual > 0) & (is_spike | (loss > 2 * usual)) & is_near
    count = where(goes_on, state.unusual + 1, where(begins, as_like(loss, 1.0), as_like(loss, 0.0)))
    count = where(state.unusual < 0, state.unusual + 1, count)
    count = where(is_finite, count, state.unusual)
    is_new = count >= TASK_STEPS
    nan = as_like(loss, math.nan)
    return replace(
        state,
        norms=emptied(state.norms, is_new),
        losses=emptied(state.losses, is_new),
        usual_norm=where(is_new, nan, state.usual_norm),
        usual_loss=where(is_new, nan, state.usual_loss),
        cap=where(is_new, as_like(loss, math.inf), state.cap),
        alarm=where(is_new, as_like(loss, 0.0), state.alarm),
        unusual=where(is_new, as_like(loss, -GRACE), count),
        unusual_loss=where(begins & negate(goes_on) & is_finite, loss, state.unusual_loss),
    )


def _overshoot(
    state: _State, norm: Scalar, loss: Scalar, usual_loss: Scalar, rate: Scalar, momentum: float
) -> tuple[Scalar, Scalar]:
    """Returns a bound on the norm of a step under SGD, and the alarm after it."""
    rate = clamp_min(rate, _TINY)  # a warm-up may begin at 0
    step, first_step = rate / (1 - momentum), rate * (1 + momentum)
    decrease = step * norm * norm
    is_positive = fmin(state.lowest_loss, loss) >= 0
    size = fmax(fmin(loss, state.highest_loss), usual_loss)
    highest = state.highest_loss
    has_risen = (loss > RISE * (1 + momentum / 2) * highest) & (decrease > OVERSHOOT * highest)
    ratio = where(state.seen < FIRST_STEPS, as_like(norm, OVERSHOOT_EARLY), as_like(norm, OVERSHOOT_LATER))
    begins = has_risen | (first_step * norm * norm > ratio * size)
    begins = begins & (state.unusual >= 0)
    is_alarmed = (begins | (state.alarm > 0)) & is_positive
    overshoots = is_alarmed & (decrease > OVERSHOOT * size)
    leaves = is_alarmed & (decrease > OUT_OF_REGION * size) & (step * norm > state.weight_norm)
    reduced = where(overshoots, square_root(REDUCED * size / step), as_like(norm, math.inf))
    region = REGION * fmax(state.weight_norm, as_like(norm, _SMALL)) / step
    reduced = where(leaves, fmin(reduced, region), reduced)
    quieter = fmax(state.alarm - 1.0, as_like(norm, 0.0))
    alarm = where((begins & is_positive) | overshoots | leaves, as_like(norm, ALARM_STEPS), quieter)
    return reduced, alarm
