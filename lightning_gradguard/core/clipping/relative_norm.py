"""The default clipping policy: bounds relative to the run's own norms, losses and weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.arguments import positive, whole_number
from lightning_gradguard.core.clipping.history import (
    CALM_RATIO,
    CAP_GROWTH,
    FIRST_STEPS,
    RECENT_RATIO,
    TASK_STEPS,
    TINY,
    Decision,
    History,
    Step,
)
from lightning_gradguard.core.clipping.policy import ClippingPolicy
from lightning_gradguard.core.clipping.scalars import (
    Scalar,
    as_like,
    clamp_min,
    fmax,
    fmin,
    negate,
    square_root,
    where,
)
from lightning_gradguard.core.norms import Gradients, Sent, StepContext

#: A norm is no spike up to this multiple of the level, however small norms have become since.
LEVEL_RATIO = 3.0
#: Under optimizers that normalize gradients, a norm this many times the level is a spike if the loss is as
#: many times the usual one.
ADAPTIVE_RATIO = 3.0
#: Under the same optimizers, a norm above its bound is clipped only beyond this multiple of it, while the
#: loss is at most twice the usual one: what is clipped does not enter their second moments, which keep the
#: steps after it short.
ADAPTIVE_CALM_RATIO = 10.0
#: A loss this many times the highest level so far, times 1 + momentum / 2, has risen: a healthy run swings
#: with momentum.
RISE = 1.2
#: Ratio of predicted decrease and loss at which a step overshoots; and, without momentum, that at which it
#: does so while the loss has not risen, in the first steps and later.
OVERSHOOT, OVERSHOOT_EARLY, OVERSHOOT_LATER = 4.0, 16.0, 32.0
#: The ratio to which an overshooting step is reduced.
REDUCED = 0.5
#: Ratio from which a step that is longer than the weights is reduced, and its length then, by weight norm.
OUT_OF_REGION, REGION = 2.0, 0.02
#: Steps between two measurements of the weights.
WEIGHTS_EVERY = 50
#: Lower bound of the weight norm.
_SMALL = 1e-3


class RelativeNormClipping(ClippingPolicy):
    """Clips a norm that stands out from the run's own, or whose step overshoots; the default policy.

    There is no absolute bound. Usual norm and loss are medians of the last `window` steps; a norm enters
    with at most its bound. The *level* is the highest usual norm so far; after the first 20 steps it grows
    by at most 0.5 % a step, so that a slow explosion is not followed.

    **Spikes**, under every optimizer, rise at once: a norm above its bound, the largest of `max_ratio` times
    the usual one, 3 times the level and 3 times the *recent* one, is clipped to the level; up to 3 times the
    bound (10 times, unless under SGD) only if the loss is more than twice the usual one. The recent norm is
    the largest after clipping, 10 % less with each later step: norms that rise step by step, as where a
    plateau is left, are no spikes. Where no loss was seen, the usual and the recent norm count as at most
    the level. Under SGD, a step is no spike if it does not overshoot its own loss: *p* below 4 without
    momentum, see below. Under any other optimizer a norm above 3 times the level with a loss above 3 times
    the usual one is a spike too. Neither holds once a loss was negative.

    **Overshoot**, under SGD while no loss was negative: *p = rate × norm² / loss* compares the decrease that
    a step along the gradient promises with the loss. On a quadratic with minimum 0, plain SGD overshoots
    above 4. An *alarm* begins at *p* > 4 with a loss 1.2 (1 + momentum / 2) times the highest usual one, or
    at *p* > 32, where *rate* is the learning rate times 1 + momentum, and *loss* that of the step, at least
    the usual one. In the first 20 steps it begins at *p* > 16 in place of 32, the loss counts as at most the
    highest usual one, and for a loss that has risen *rate* is as in an alarm. It ends 60 steps after the
    last overshoot. In an alarm, *rate* is the learning rate divided by 1 - momentum, and the loss at most
    the highest usual one: a step with *p* > 4 is reduced to *p* = 0.5, and one with *p* > 2 that is longer
    than the norm of the weights to 0.02 of it. The reduced norm is the *cap* of later ones; it grows by 2 %
    with each step that it bounds, and is as many times larger as the learning rate is lower than when it was
    set.

    **A new task**, as in a curriculum or on other data, is no explosion: three losses in a row above twice
    those before, all within 20 times the first of them. That one is above 5 times the usual loss, or each of
    the last ten, and at least a tenth of the highest usual one, after recent norms of at most 3 times the
    usual ones: such a jump was not caused by the steps before. Usual norm and loss are then those of the new
    task, the cap is lifted, and for 20 steps the level follows the norms, overshoot is not looked for, and
    only norms above `max_ratio` times the recent one are spikes. No new task begins in the first 20 steps,
    or in an alarm.

    **Batches of another kind**, as of a task among others, have losses that recur between usual ones: four
    and one in sixteen more of those in the window, with a usual one among as many last. The least of them
    takes the place of the usual loss in the rules above, its ratio to that raises the bound of norms without
    a rise of the loss, and the cap is lifted once it is twice the highest usual one so far.

    Without a loss, or after a negative one, only spikes are clipped. The norm of the weights is measured
    once in 50 steps. A norm of 0 or a nonfinite number changes nothing. Numbers on a device enter the
    history a step later, when they have arrived on the host: decisions are the same, without a
    synchronization.

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
        self._history = History(self.window)
        self._pending: tuple[Step, Decision]
        self._late: Sent | None = None
        self._has_rate = True
        self.wants_weight_norm = True

    def coefficients(self, gradients: Gradients) -> Scalar:
        """Returns one coefficient, by the spike rule and the overshoot rule."""
        context = gradients.context or StepContext()
        rate, weight_norm = context.learning_rate, context.weight_norm
        self._has_rate = rate is not None
        if self._late is not None:
            self._settle(self._late)
        norm: Scalar | None = None if isinstance(rate, Tensor) else gradients.known_norm
        if norm is None:
            norm = gradients.total_norm
        step = Step(
            norm=norm,
            loss=context.loss,
            rate=math.nan if rate is None else rate,
            weight_norm=math.nan if weight_norm is None else weight_norm,
            momentum=context.momentum,
        )
        decision = self._decide(step)
        allowed, self._pending = decision.allowed, (step, decision)
        self.threshold = fmin(decision.bound, decision.cap)
        if allowed is norm:
            return 1.0
        is_clipped = (norm > allowed) & (norm < math.inf) & (abs(context.loss) != math.inf)
        return where(is_clipped, allowed / clamp_min(norm, TINY), 1.0)

    def commit(self) -> None:
        """Adds the step that `coefficients` saw last to the history.

        Numbers on a device are sent to the host, and enter it at the next step. The norm of the weights is
        wanted once in 50 steps, under an optimizer whose steps are along the gradient.
        """
        step, decision = self._pending
        steps = self._history.steps_since_weights + 1
        self.wants_weight_norm = self._has_rate and steps % WEIGHTS_EVERY == 0
        if isinstance(step.norm, Tensor):  # as it is wherever another number is
            self._late = Sent(torch.stack([torch.as_tensor(as_like(step.norm, number)) for number in step]))
        else:
            self._history.add(step, decision)

    def state_dict(self) -> dict[str, Any]:
        """Returns the history, and the numbers of a step that may not have arrived."""
        if self._late is not None and self._late.is_on_host:
            self._settle(self._late)
        late = {} if self._late is None else {"late": self._late.values}
        return self._history.state_dict() | late

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved history, also one of another `window`."""
        self._late = Sent(state_dict["late"]) if "late" in state_dict else None
        self._history = History(self.window, state_dict)
        steps = self._history.steps_since_weights + (self._late is not None)
        self.wants_weight_norm = self._has_rate and steps % WEIGHTS_EVERY == 0

    def _settle(self, late: Sent) -> None:
        """Adds the step before, whose numbers were on a device, to the history: they have arrived by now."""
        step = Step(*late.read())
        self._late = None
        self._history.add(step, self._decide(step))

    def _decide(self, step: Step) -> Decision:
        """Returns what is allowed in a step."""
        history, norm, loss = self._history, step.norm, step.loss
        has_ratio = history.lowest_loss >= 0  # losses around 0 have none
        usual, recent, usual_loss = history.usual_norm, history.recent, history.usual_loss
        if usual_loss != usual_loss:
            # a slow explosion is not followed where no loss shows it
            usual = recent = min(usual, history.level)
        bound = max(self.max_ratio * usual, LEVEL_RATIO * history.level, RECENT_RATIO * recent)
        level_bound = ADAPTIVE_RATIO * history.level
        if history.unusual < 0:
            bound = max(bound, self.max_ratio * recent)
            level_bound = max(level_bound, self.max_ratio * recent)
        # what is false on the host needs no further look
        is_spike = norm > bound
        if is_spike is not False:
            calm_ratio = CALM_RATIO if self._has_rate else ADAPTIVE_CALM_RATIO
            recurring = history.recurring_loss
            if has_ratio and recurring > usual_loss:
                calm_ratio *= recurring / max(usual_loss, TINY)
            is_calm = (loss <= recurring + abs(recurring)) & (norm <= calm_ratio * bound)
            is_spike = is_spike & negate(is_calm)
        if has_ratio and not self._has_rate:
            stands_out = norm > level_bound
            if stands_out is not False:
                is_spike = is_spike | (stands_out & (loss > ADAPTIVE_RATIO * history.recurring_loss))
        elif has_ratio and is_spike is not False:
            first_decrease = step.rate * (1 + step.momentum) * norm * norm
            is_spike = is_spike & negate(first_decrease < OVERSHOOT * fmax(loss, usual_loss))
        is_new = history.unusual == TASK_STEPS - 1 and history.goes_on(loss)
        allowed = norm if is_spike is False else where(is_spike, history.level, norm)
        cap: Scalar = math.inf
        reduced: Scalar = math.inf
        has_alarm: Tensor | bool = False
        if self._has_rate and has_ratio and history.unusual >= 0:
            cap, has_alarm = _overshoot(history, step, allowed)
            reduced = cap
        if history.cap < math.inf:
            earlier = history.relief(step.rate) * history.cap
            cap = fmin(reduced, where(norm > earlier, CAP_GROWTH * earlier, earlier))
        if isinstance(cap, Tensor) or cap < math.inf:
            allowed = fmin(allowed, cap)
        if is_new is not False:
            allowed = where(is_new, norm, allowed)
        return Decision(bound, allowed, cap, reduced, has_alarm, is_new)


def _overshoot(history: History, step: Step, norm: Scalar) -> tuple[Scalar, Tensor | bool]:
    """Returns a bound on the norm of a step under SGD, and whether there is an alarm on its account."""
    loss, momentum, highest, usual_loss = step.loss, step.momentum, history.highest_loss, history.usual_loss
    rate = clamp_min(step.rate, TINY)  # a warm-up may begin at 0
    length, is_first = rate / (1 - momentum), history.seen < FIRST_STEPS
    square = norm * norm
    decrease, first_decrease = length * square, rate * (1 + momentum) * square
    size, own_size = fmax(fmin(loss, highest), usual_loss), fmax(loss, usual_loss)
    has_risen = (loss > RISE * (1 + momentum / 2) * highest) & (decrease > OVERSHOOT * highest)
    if is_first:
        begins = has_risen | (first_decrease > OVERSHOOT_EARLY * size)
    else:
        ratio = where(has_risen, OVERSHOOT, OVERSHOOT_LATER)
        begins = first_decrease > ratio * own_size
    is_alarmed = begins | (history.alarm > 0)
    overshoots = is_alarmed & (decrease > OVERSHOOT * size)
    weight_norm = step.weight_norm
    if not isinstance(weight_norm, Tensor) and weight_norm != weight_norm:
        weight_norm = history.weight_norm
    leaves = is_alarmed & (decrease > OUT_OF_REGION * size) & (length * norm > weight_norm)
    reduced = where(overshoots, square_root(REDUCED * size / length), math.inf)
    region = REGION * fmax(weight_norm, _SMALL) / length
    return where(leaves, fmin(reduced, region), reduced), begins | overshoots | leaves
