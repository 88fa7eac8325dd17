"""The time that a treatment may take."""

from __future__ import annotations

import re
import time

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_PATTERN = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|m|h|)\s*")


def seconds(budget: str | float) -> float:
    """Returns a budget in seconds.

    Raises:
        ValueError: If it is no time, or not positive.

    Example:
        >>> seconds("10m"), seconds("90s"), seconds("1.5h"), seconds(600)
        (600.0, 90.0, 5400.0, 600.0)
    """
    match = _PATTERN.fullmatch(str(budget)) if not isinstance(budget, bool) else None
    if match is None or not float(match[1]) > 0:
        raise ValueError(f"budget={budget!r} must be a time such as '10m', '90s', '2h', or seconds.")
    return float(match[1]) * _UNITS[match[2]]


class Clock:
    """Measures how much of a budget is left.

    Args:
        budget: In seconds.
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self._start = time.monotonic()

    def __str__(self) -> str:
        """Returns what is spent of the budget."""
        return f"{self.spent:4.0f} s of {self.budget:.0f} s"

    @property
    def spent(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def share(self, fraction: float) -> float:
        """Returns the moment at which a fraction of the budget is spent."""
        return self._start + fraction * self.budget
