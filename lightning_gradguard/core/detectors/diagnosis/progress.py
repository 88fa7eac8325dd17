"""The progress of the loss: against its start, and against the best constant answer."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from statistics import mean
from typing import Any

from lightning_gradguard.core.detectors.best_constant import CONVERGED, LEARNS, STUCK
from lightning_gradguard.core.detectors.diagnosis.sample import Sample, Update

#: Sampled losses that are averaged.
RECENT = 3
#: Loss below 0, over the size of the first one or 1, and its growth from one sample to the next, of a loss
#: that falls without bound.
UNBOUNDED, UNBOUNDED_GROWTH = 1e4, 2.0
#: The same of one that falls more slowly, where the rms of the answers has risen so many times from 1, or
#: from the first if that is larger.
SLOWLY, SLOW_GROWTH, RISEN_OUTPUT = 1e2, 1.1, 30.0
#: Spread of the answers over that in the sample before, from which on it is more than noise of the batch.
SPREADING = 1.1
#: The same, over that of the most spread answers so far, of a network whose answers have become one; and
#: where hardly any loss is left with it.
COLLAPSED, COLLAPSED_FOR_NOTHING = 0.1, 0.25
#: Share of the loss that is left of one that a network has learned halfway.
HALFWAY = 0.5
#: Loss over the first one, and over that of the best constant, of a network that training makes worse.
WORSE = 1.2
#: Rows by which it is known if targets depend on inputs, standard deviations up to which it is chance, and
#: from which on it is none.
KNOWN_ROWS, CHANCE, CERTAIN = 192, 1.3, 3.0
#: Step up to which the first update is that of a fresh run, of which a GradScaler skips some.
STARTED_BY = 5
#: Two sizes of gradients differ by more than this share, unless both were clipped to one value.
CLIPPED_ALIKE = 1e-4
#: The smallest norm of a gradient that differs from zero.
TINY = 1e-45


class Progress:
    """Keeps the losses of the sampled steps.

    Attributes:
        first: The first loss.
        began_whole: True if a known loss was all of it.
        largest_update: Largest norm of an update over that of all weights.
        has_rate: True once a schedule has left a rate.
        had_gradient: True once a layer's output has had a gradient.
        over_constant_now: As `over_constant`, or that of the last sample alone if it is lower.
        others: What terms beside the first call of a loss have added at first, in the sample before, and now.
        ends_early: Step before which no schedule of a run of this length takes the rate away.
    """

    def __init__(self) -> None:
        self.first, self.began_whole = math.nan, False
        self.largest_update = 0.0
        self.has_rate = False
        self.had_gradient = False
        self.ends_early = 0.0
        self.others = (math.nan, math.nan, math.nan)
        self._losses: deque[float] = deque(maxlen=RECENT)
        self._calls: dict[str, deque[tuple[float, float]]] = defaultdict(partial(deque, maxlen=RECENT))
        self._ratios: list[float] = []
        self.over_constant_now = math.nan
        self._range = (math.inf, -math.inf)
        self._sizes: dict[int, tuple[float, ...]] = {}
        self._fixed: dict[int, list[float]] = {}
        self._players: dict[str, tuple[float, float]] = {}
        self._largest_weights: dict[str, float] = {}
        self._spreads, self._widest = (math.nan, math.nan), 0.0
        self._outputs = (math.nan, math.nan)
        self._is_alone = False
        self._dependence = (math.nan, 0.0)

    def update(self, sample: Sample) -> None:
        """Adds a sample."""
        if math.isnan(self.first):
            self.began_whole = sample.is_whole
        if math.isfinite(sample.loss):
            self.first = sample.loss if math.isnan(self.first) else self.first
            self._losses.append(sample.loss)
            self._range = min(self._range[0], sample.loss), max(self._range[1], sample.loss)
        rest = next((sample.loss - call.weight * call.value for call in sample.calls), math.nan)
        self.others = rest if math.isnan(self.others[0]) else self.others[0], self.others[2], rest
        if not math.isnan(sample.dependence[0]):
            self._dependence = sample.dependence
        self._spreads = self._spreads[1], sample.spread
        self._widest = max(self._widest, sample.spread)  # as before if that is NaN
        last = next((layer.output for layer in sample.layers if layer.is_last), math.nan)
        self._outputs = last if math.isnan(self._outputs[0]) else self._outputs[0], last
        # of several optimizers, one may follow what another one moves, as a policy does its critic
        self._is_alone = len(sample.updates) == 1
        self.had_gradient |= any(gradient > 0 for layer in sample.layers for gradient in layer.gradients)
        self._ratios = []
        for number, call in enumerate(sample.calls):
            recent = self._calls[f"{number}.{call.function}"]
            recent.append((call.value, call.constant_here))
            known = [(value, constant) for value, constant in recent if constant > 0]
            value, constant = (sum(column) for column in zip(*known, strict=True)) if known else (0, 0)
            if constant > 0 and not math.isnan(value):
                self._ratios.append(value / constant)
        now = [call.value / call.constant_here for call in sample.calls if call.constant_here > 0]
        self.over_constant_now = min([*now, self.over_constant]) if now else math.nan
        for index, update in enumerate(sample.updates):
            self.largest_update = max(self.largest_update, update.share)  # as before if the share is NaN
            # of a run that is resumed without this state, the start is not known
            is_resumed = not self._sizes and sample.step > STARTED_BY
            self.has_rate = self.has_rate or is_resumed or not update.has_no_rate
            before, self._sizes[index] = self._sizes.get(index, ()), update.sizes
            self._fixed[index] = [
                now if now > 0 and math.isclose(now, then, rel_tol=CLIPPED_ALIKE) else math.nan
                for then, now in zip(before, update.sizes, strict=False)
            ]
            first, largest = self._players.get(update.names[0], (update.loss, 0.0))
            self._players[update.names[0]] = first, max(update.total_norm, largest)
            for name, norm in zip(update.names, update.weights, strict=False):
                if math.isfinite(norm):
                    self._largest_weights[name] = max(norm, self._largest_weights.get(name, 0.0))

    def fixed_sizes(self, index: int) -> list[float]:
        """Returns the `sizes` of an update that are those of the sample before; NaN for the others."""
        return self._fixed.get(index, []) or [math.nan] * 3

    @property
    def may_be_clipped_by_value(self) -> bool:
        """True until the largest elements of two samples differ."""
        # after one sample there is none to compare it with
        return not self._fixed or any(not (fixed and math.isnan(fixed[1])) for fixed in self._fixed.values())

    def vanished(self, update: Update) -> float:
        """Returns the decades by which the gradient of an update has shrunk while its loss has not fallen."""
        first, largest = self._players[update.names[0]]
        has_fallen = not update.loss >= first
        return 0.0 if has_fallen or not largest > 0 else math.log10(largest / max(update.total_norm, TINY))

    def had_no_gradient(self, update: Update) -> bool:
        """True if the gradient of an update has been exactly zero in all samples."""
        return self._players[update.names[0]][1] == 0

    def shrunk(self, name: str, norm: float) -> float:
        """Returns the norm of a weight over the largest that was sampled; 1 if that is unknown or 0."""
        largest = self._largest_weights.get(name, 0.0)
        return norm / largest if largest > 0 else 1.0

    @property
    def over_constant(self) -> float:
        """The recent loss over that of the best constant, the lowest of all losses; NaN if unknown."""
        return min(self._ratios, default=math.nan)

    @property
    def over_first(self) -> float:
        """The recent loss over the first one; NaN if unknown or not positive."""
        return mean(self._losses) / self.first if self._losses and self.first > 0 else math.nan

    @property
    def has_stayed(self) -> bool:
        """True if the recent loss is not clearly below the first one; of one below 0, not below it."""
        return self.over_first > LEARNS or (self.first <= 0 and mean(self._losses) >= self.first)

    @property
    def gets_worse(self) -> bool:
        """True if the recent loss is clearly above the first one and above that of the best constant."""
        return self.over_first > WORSE and self.over_constant > WORSE

    @property
    def falls(self) -> bool:
        """True if the loss is on its way to that of the best constant, as of answers that begin large.

        It is 2 to 100 times that; one that is farther, as of raw inputs, does not arrive.
        """
        return self.has_fallen and 2 < self.over_constant < 100

    @property
    def has_fallen(self) -> bool:
        """True if the loss is a fifth below the first one, and has fallen by a twentieth recently."""
        return self.over_first < 0.8 and self._losses[-1] < 0.95 * self._losses[0]

    @property
    def rise(self) -> float:
        """The last loss over the first one; NaN if unknown or not positive."""
        return self._losses[-1] / self.first if self._losses and self.first > 0 else math.nan

    @property
    def lowest(self) -> float:
        """The lowest loss over the first one; NaN if unknown or not positive."""
        return self._range[0] / self.first if self.first > 0 else math.nan

    @property
    def may_be_unrelated(self) -> bool:
        """True if the loss does not fall, and targets have not been seen to depend on the inputs."""
        is_stuck = self.is_halfway and not (self.over_constant <= STUCK or self.falls)
        return is_stuck and not self._dependence[0] >= CERTAIN

    @property
    def is_unrelated(self) -> bool:
        """True if the targets do not depend on the inputs, by a measure of the data alone."""
        return self._dependence[1] >= KNOWN_ROWS and self._dependence[0] < CHANCE

    @property
    def is_unbounded(self) -> bool:
        """True if the recent losses are far below 0, and each falls by far, or answers rise with it."""
        losses, (first, last) = list(self._losses), self._outputs
        has_risen = self._is_alone and last > RISEN_OUTPUT * max(first, 1.0)
        bound, growth = (SLOWLY, SLOW_GROWTH) if has_risen else (UNBOUNDED, UNBOUNDED_GROWTH)
        falls = all(now < growth * before < 0 for before, now in pairwise(losses))
        return len(losses) == RECENT and falls and losses[-1] < -bound * max(abs(self.first), 1.0)

    @property
    def spreads_out(self) -> bool:
        """True if answers differ clearly more than in the sample before."""
        return self._spreads[1] > SPREADING * self._spreads[0]

    @property
    def is_constant(self) -> bool:
        """True if all losses so far are the same."""
        return self._range[0] == self._range[1]

    @property
    def has_collapsed(self) -> bool:
        """True if answers differ by far less than they have."""
        share = COLLAPSED_FOR_NOTHING if self.has_converged else COLLAPSED
        return self._spreads[1] < share * self._widest

    @property
    def spread(self) -> float:
        """The highest sampled loss less the lowest one, over the first; NaN if unknown."""
        return (self._range[1] - self._range[0]) / abs(self.first) if self.first else math.nan

    @property
    def has_converged(self) -> bool:
        """True if hardly any loss is left, with which gradients are small: nothing has to move."""
        return self._best < CONVERGED

    @property
    def is_halfway(self) -> bool:
        """True if more than half of the loss is left."""
        return self._best > HALFWAY

    @property
    def learns(self) -> bool:
        """True if the loss is clearly below that of the best constant or, if unknown, below its start."""
        return self._best < LEARNS

    @property
    def _best(self) -> float:
        ratio = self.over_constant
        return self.over_first if math.isnan(ratio) else ratio

    def state_dict(self) -> dict[str, Any]:
        """Returns the recent losses."""
        calls = {key: list(recent) for key, recent in self._calls.items()}
        return {
            "first": self.first,
            "whole": self.began_whole,
            "others": list(self.others),
            "losses": list(self._losses),
            "calls": calls,
            "range": list(self._range),
            "spreads": list(self._spreads),
            "widest": self._widest,
            "outputs": list(self._outputs),
            "sizes": {index: list(sizes) for index, sizes in self._sizes.items()},
            "weights": dict(self._largest_weights),
            "players": {name: list(known) for name, known in self._players.items()},
            "update": self.largest_update,
            "has_rate": self.has_rate,
            "had_gradient": self.had_gradient,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continues with saved losses."""
        self.first, self.began_whole = state_dict["first"], state_dict.get("whole", False)
        self.others = tuple(state_dict.get("others", self.others))
        self._losses = deque(state_dict["losses"], maxlen=RECENT)
        self._range = tuple(state_dict.get("range", (math.inf, -math.inf)))
        self._spreads = tuple(state_dict.get("spreads", (math.nan, math.nan)))
        self._widest = state_dict.get("widest", 0.0)
        self._outputs = tuple(state_dict.get("outputs", (math.nan, math.nan)))
        self._calls.clear()
        for key, recent in state_dict["calls"].items():
            self._calls[key] = deque(map(tuple, recent), maxlen=RECENT)
        self._sizes = {index: tuple(sizes) for index, sizes in state_dict.get("sizes", {}).items()}
        self._largest_weights = dict(state_dict.get("weights", {}))
        self._players = {name: tuple(known) for name, known in state_dict.get("players", {}).items()}
        self.largest_update = state_dict.get("update", 0.0)
        self.has_rate = state_dict.get("has_rate", True)
        self.had_gradient = state_dict.get("had_gradient", False)
