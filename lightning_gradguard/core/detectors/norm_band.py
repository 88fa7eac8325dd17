"""The band that most total norms are in."""

from __future__ import annotations

import math
from collections import deque
from statistics import quantiles
from typing import Any

#: Logged steps whose norms are kept.
WINDOW = 100


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
