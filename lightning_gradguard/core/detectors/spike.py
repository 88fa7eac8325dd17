"""Detects values that stand out upwards from their recent past."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

#: While there is too little history for a deviation, a spike is this many times the largest value so far.
EARLY_SPIKE = 100.0
#: The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_STD = 1.4826


class SpikeDetector:
    """Says whether a positive number stands out upwards from its recent past, on a log scale.

    The window holds past values with a delay, so that a spike cannot raise the level that it is compared
    with; values enter it no higher than the bound, so that the detector follows a level that has changed
    for good. Nonfinite and nonpositive values are no spikes and never enter.

    Before there is history enough, only a value a hundred times larger than all others so far is a spike.

    Args:
        window: Values remembered.
        threshold: Deviations above the median that make a spike.
        min_std: The deviation, of the logarithm, counts at least this much.
        min_history: Values in the window before deviations are trusted.
        delay: Values that wait before they enter the window.

    Example:
        >>> detector = SpikeDetector()
        >>> any(detector.update(1.0) for _ in range(50)), detector.update(10.0)
        (False, True)
    """

    def __init__(
        self,
        window: int = 128,
        threshold: float = 4.0,
        min_std: float = 0.25,
        min_history: int = 32,
        delay: int = 10,
    ) -> None:
        self._threshold = threshold
        self._min_std = min_std
        self._min_history = min_history
        self._delay = delay
        self._window: deque[float] = deque(maxlen=window)
        self._sorted: list[float] = []
        self._waiting: deque[float] = deque()
        self._highest = -math.inf

    def update(self, value: float) -> bool:
        """Judge a value, then remember it."""
        if not (math.isfinite(value) and value > 0):
            return False
        logarithm = math.log(value)
        bound = self._log_bound(logarithm)
        is_spike = logarithm > bound
        if not is_spike:
            self._highest = max(self._highest, logarithm)
        self._waiting.append(min(logarithm, bound))
        if len(self._waiting) > self._delay:
            self._enter(self._waiting.popleft())
        return is_spike

    def state_dict(self) -> dict[str, Any]:
        """The window, the values that wait, and the largest that was no spike."""
        waiting = list(self._waiting)
        return {"window": list(self._window), "waiting": waiting, "highest": self._highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with a saved window."""
        self._window = deque(state_dict["window"], maxlen=self._window.maxlen)
        self._sorted = sorted(self._window)
        self._waiting = deque(state_dict["waiting"])
        self._highest = state_dict["highest"]

    def _log_bound(self, logarithm: float) -> float:
        """What this value must not exceed; one that is surely below costs no look at the deviation."""
        if len(self._sorted) < self._min_history:
            return math.inf if self._highest == -math.inf else self._highest + math.log(EARLY_SPIKE)
        centre = median_of_sorted(self._sorted)
        least = centre + self._threshold * self._min_std
        if logarithm <= least:
            return least
        deviation = median(abs(value - centre) for value in self._sorted)
        return centre + self._threshold * max(MAD_TO_STD * deviation, self._min_std)

    def _enter(self, logarithm: float) -> None:
        if len(self._window) == self._window.maxlen:
            del self._sorted[bisect_left(self._sorted, self._window[0])]
        self._window.append(logarithm)
        insort(self._sorted, logarithm)


def median_of_sorted(ordered: Sequence[float]) -> float:
    """Median of an ascending, nonempty sequence."""
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
