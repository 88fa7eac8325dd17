"""Detection of values far above their recent past, and alarms on them at a bounded rate."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from lightning_gradguard.core.detectors.sorted_window import SortedWindow

#: While the history is too short for a spread, a spike is this many times the largest value so far.
EARLY_SPIKE_RATIO = 100.0
#: A spike is so many spreads above the median.
SPIKE_THRESHOLD = 3.0
#: The upper spread of a window is the distance from its median to this quantile.
UPPER_QUANTILE = 0.9
#: Lower bound of the spread as a share of the median.
MIN_RELATIVE_SPREAD = 0.002
#: The median absolute deviation of a normal distribution times this is its standard deviation.
MAD_TO_STD = 1.4826
#: A small rise is a spike if so many values in a row are above a bound of its own.
PERSISTENT_VALUES = 6
#: A value enters the window with at most this multiple of the distance of its bound from the median.
ENTERS_AT_MOST = 2.0
#: Past values in the window, and how many of them are needed for the spread.
WINDOW, MIN_HISTORY = 128, 32
#: Values that pass before one enters the window.
DELAY = 10
#: A rise that lasts is a spike from so many spreads on.
PERSISTENT_THRESHOLD = 1.5
#: Steps without an alarm after the first one; each further alarm doubles them.
QUIET_STEPS = 256
#: Steps without a spike after which one doubling is undone.
CALM_STEPS = 2000


class SpikeDetector:
    """Detects numbers that are far above their recent past, by the spread that their tails have there.

    The distance from the median of the window to a value is compared with the spread, the mean of two
    distances: to the upper decile, and to the highest value of the window. Heavy tails raise the second, so
    that one threshold fits normal, skewed and heavy-tailed noise. A smaller rise is a spike if it lasts: six
    values in a row more than one and a half spreads above the median. docs/evidence_rates.md has the table
    that chose both. Values enter the window after a delay, so that a spike cannot raise the level that it is
    compared with, and clipped to twice the bound's distance, so that the detector follows a level that has
    changed for good, and falls silent where spikes are the nature of the run. Nonfinite values are no spikes
    and never enter.

    Before 32 values, only a value a hundred times larger than all others so far is a spike.

    Args:
        threshold: A spike is so many spreads above the median.

    Attributes:
        is_persistent: True if the last value belongs to a rise that lasts.

    Example:
        >>> detector = SpikeDetector()
        >>> any(detector.update(1.0) for _ in range(50)), detector.update(10.0)
        (False, True)
    """

    def __init__(self, threshold: float = SPIKE_THRESHOLD) -> None:
        self._threshold = threshold
        self._window = SortedWindow(WINDOW)
        self._delayed: deque[float] = deque()
        self._highest = 0.0
        self._risen_in_a_row = 0
        self.is_persistent = False

    def update(self, value: float) -> bool:
        """Returns True if a value is a spike, and adds it to the history."""
        if not math.isfinite(value):
            return False
        centre, bound, persistent_bound = self._bounds()
        self._risen_in_a_row = self._risen_in_a_row + 1 if value > persistent_bound else 0
        self.is_persistent = self._risen_in_a_row >= PERSISTENT_VALUES
        is_spike = value > bound or self.is_persistent
        if value > self._highest and not is_spike:
            self._highest = value
        highest = centre + ENTERS_AT_MOST * (bound - centre)
        self._delayed.append(highest if value > highest else value)
        if len(self._delayed) > DELAY:
            self._window.append(self._delayed.popleft())
        return is_spike

    def state_dict(self) -> dict[str, Any]:
        """Returns the window, the delayed values, and the largest that was no spike."""
        return {
            "values": list(self._window.values),
            "delayed": list(self._delayed),
            "largest": self._highest,
            "risen": [True] * min(self._risen_in_a_row, PERSISTENT_VALUES),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved window; that of version 0.5 holds logarithms."""
        if "values" not in state_dict:
            window, delayed = ([math.exp(v) for v in state_dict[key]] for key in ("window", "waiting"))
            largest = math.exp(state_dict["highest"])
            state_dict = {"values": window, "delayed": delayed, "largest": largest, "risen": []}
        self._window = SortedWindow(WINDOW, state_dict["values"])
        self._delayed = deque(state_dict["delayed"])
        self._highest = state_dict["largest"]
        risen = list(state_dict["risen"])
        self._risen_in_a_row = (risen[::-1] + [False]).index(False)

    def _bounds(self) -> tuple[float, float, float]:
        """Returns the median, the largest value that is no spike, and the same for a rise that lasts."""
        ordered = self._window.ordered
        n = len(ordered)
        if n < MIN_HISTORY:
            bound = EARLY_SPIKE_RATIO * self._highest if self._highest > 0 else math.inf
            return 0.0, bound, math.inf
        centre = ordered[n // 2]
        upper = ordered[int(UPPER_QUANTILE * (n - 1))]
        spread = max((upper + ordered[-1]) / 2 - centre, MIN_RELATIVE_SPREAD * abs(centre))
        # a steady rise is not to be taken for a level that changes: the window must be long enough to show it
        lasts = PERSISTENT_THRESHOLD * spread if 2 * n >= WINDOW else math.inf
        return centre, centre + self._threshold * spread, centre + lasts


class SpikeAlarm:
    """Decides which spikes are worth an alarm: one an episode, and fewer the more there are.

    After an alarm there is none for 256 steps, after the next one for 512, and so on; 2,000 steps without a
    spike undo one doubling.

    Example:
        >>> alarm = SpikeAlarm()
        >>> [alarm.update(True) for _ in range(3)]
        [True, False, False]
    """

    def __init__(self) -> None:
        self._quiet = 0
        self._calm = 0
        self._alarms = 0

    def update(self, is_spike: bool) -> bool:
        """Adds a step; returns True if it is worth an alarm."""
        self._quiet = max(self._quiet - 1, 0)
        self._calm = 0 if is_spike else self._calm + 1
        if self._calm >= CALM_STEPS:
            self._calm, self._alarms = 0, max(self._alarms - 1, 0)
        if not is_spike or self._quiet:
            return False
        self._quiet = QUIET_STEPS * 2**self._alarms
        self._alarms += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """Returns the counters."""
        return {"quiet": self._quiet, "calm": self._calm, "alarms": self._alarms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self._quiet, self._calm = state_dict["quiet"], state_dict["calm"]
        self._alarms = state_dict["alarms"]
