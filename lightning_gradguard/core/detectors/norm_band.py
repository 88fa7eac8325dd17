"""The band that most total norms are in, and norms far above it."""

from __future__ import annotations

import math
from collections import deque
from statistics import median, quantiles
from typing import Any

#: Logged steps whose norms are kept.
WINDOW = 100
#: A total norm, or a loss, explodes if it is this many times the median before it.
EXPLOSION = 100.0
#: A norm that explodes is also above this many times the norm at the start: late in a run norms are small.
ABOVE_START = 10.0


class NormBand:
    """Total norms of the last 100 logged steps, and the band that most of them are in."""

    def __init__(self) -> None:
        self._totals: deque[float] = deque(maxlen=WINDOW)

    def add(self, total_norm: float) -> None:
        """Adds the norm of a step; a nonfinite one does not enter."""
        if math.isfinite(total_norm):
            self._totals.append(total_norm)

    def band(self) -> tuple[float, float] | None:
        """Returns the central 90 % of the total norms in the window; `None` for fewer than two."""
        if len(self._totals) < 2:
            return None
        low, *_, high = quantiles(self._totals, n=20, method="inclusive")
        return low, high

    def state_dict(self) -> dict[str, Any]:
        """Returns the window."""
        return {"totals": list(self._totals)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved window; checkpoints from before 0.5 have none."""
        self._totals = deque(state_dict.get("totals", ()), maxlen=WINDOW)


class Explosion:
    """The largest total norm that explodes.

    Attributes:
        largest: That norm, and the median of those before it; `None` if there is none.

    Example:
        >>> explosion = Explosion()
        >>> for norm in (1.0, 2.0, 1.0, 500.0):
        ...     explosion.add(norm)
        >>> explosion.largest
        (500.0, 1.0)
    """

    def __init__(self) -> None:
        self.largest: tuple[float, float] | None = None
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._start = 0.0

    def add(self, total_norm: float) -> None:
        """Adds the norm of a step."""
        self._start = self._start or total_norm
        if total_norm > max(ABOVE_START * self._start, (self.largest or (0.0,))[0]):
            usual = median(self._recent)
            if 0 < EXPLOSION * usual < total_norm:
                self.largest = total_norm, usual
        self._recent.append(total_norm)
