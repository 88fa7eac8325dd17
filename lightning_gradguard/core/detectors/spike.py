"""Detection of values far above their recent past."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

#: While the history is too short for a deviation, a spike is this many times the largest value so far.
EARLY_SPIKE_RATIO = 100.0
#: The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_STD = 1.4826


class SpikeDetector:
    """Detects positive numbers that are far above their recent past, on a log scale.

    Values enter the window after a delay, so that a spike cannot raise the level that it is compared with,
    and clipped to the bound, so that the detector follows a level that has changed permanently. Nonfinite and
    nonpositive values are no spikes and never enter.

    Before `min_history` values, only a value a hundred times larger than all others so far is a spike.

    Args:
        window: Number of past values.
        threshold: Deviations above the median from which on a value is a spike.
        min_std: Lower bound of the deviation of the logarithm.
        min_history: Values in the window from which on deviations are used.
        delay: Number of values before a value enters the window.

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
        self._delayed: deque[float] = deque()
        self._highest = -math.inf

    def update(self, value: float) -> bool:
        """Returns True if a value is a spike, and adds it to the history."""
        if not (math.isfinite(value) and value > 0):
            return False
        logarithm = math.log(value)
        bound = self._log_bound(logarithm)
        is_spike = logarithm > bound
        if not is_spike:
            self._highest = max(self._highest, logarithm)
        self._delayed.append(min(logarithm, bound))
        if len(self._delayed) > self._delay:
            self._enter(self._delayed.popleft())
        return is_spike

    def state_dict(self) -> dict[str, Any]:
        """Returns the window, the delayed values, and the largest that was no spike."""
        delayed = list(self._delayed)
        return {"window": list(self._window), "waiting": delayed, "highest": self._highest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved window."""
        self._window = deque(state_dict["window"], maxlen=self._window.maxlen)
        self._sorted = sorted(self._window)
        self._delayed = deque(state_dict["waiting"])
        self._highest = state_dict["highest"]

    def _log_bound(self, logarithm: float) -> float:
        """Returns the bound of this value; the deviation is computed only if it can matter."""
        if len(self._sorted) < self._min_history:
            return math.inf if self._highest == -math.inf else self._highest + math.log(EARLY_SPIKE_RATIO)
        centre = _median_of_sorted(self._sorted)
        lowest = centre + self._threshold * self._min_std
        if logarithm <= lowest:
            return lowest
        deviation = median(abs(value - centre) for value in self._sorted)
        return centre + self._threshold * max(MAD_TO_STD * deviation, self._min_std)

    def _enter(self, logarithm: float) -> None:
        if len(self._window) == self._window.maxlen:
            del self._sorted[bisect_left(self._sorted, self._window[0])]
        self._window.append(logarithm)
        insort(self._sorted, logarithm)


def _median_of_sorted(ordered: Sequence[float]) -> float:
    """Returns the median of an ascending, nonempty sequence."""
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
