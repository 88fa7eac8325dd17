"""Detection of clipping that sets the length of most steps."""

from __future__ import annotations

from typing import Any

#: A step is clipped hard below this coefficient: clipping shortens it more than anything else sets it.
HARD_CLIPPING = 0.5
#: Clipping is constant if it is hard in more than this share of the steps.
CONSTANT_CLIPPING = 0.5
#: A run is not healthy if more than this share of its steps is clipped to less than this share of their norm;
#: the latter is higher where updates are known to be too large without clipping.
NEARLY_ALL, FAR_CLIPPING, FAR_IF_TOO_LARGE = 0.9, 1e-4, 0.1
#: Updates are usually about this share of the norm of the weights; clipping that leaves less may hinder.
USUAL_UPDATE = 1e-3
#: Steps over which the share is taken.
SHARE_STEPS = 100
#: Weight of a step in the share of the last ones.
LAST_STEPS = 1 / 20


def describe_clipping(share: float, coefficient: float | None = None) -> str:
    """Returns the clipping of a run in words, the same wherever it is named.

    Example:
        >>> describe_clipping(0.1264), describe_clipping(1.0, 9.42e-10)
        ('12.6% of the steps were clipped', '100% of the steps were clipped, to 9.4e-10 of their norm')
    """
    left = "" if coefficient is None else f", to {coefficient:.2g} of their norm"
    return f"{percent(share)} of the steps were clipped{left}"


def percent(share: float) -> str:
    """Returns a share in percent, with three digits.

    Example:
        >>> percent(0.12345), percent(1.0)
        ('12.3%', '100%')
    """
    return f"{100 * share:.3g}%"


class ConstantClippingDetector:
    """Finds out whether clipping sets the length of most steps, once an episode.

    Attributes:
        of_last: Share of the last steps that were clipped hard, by an average over about twenty.

    Example:
        >>> detector = ConstantClippingDetector()
        >>> detector.update(90, 100), detector.update(90, 100), detector.update(10, 100)
        (0.9, None, None)
        >>> detector.update(40, 50), detector.update(40, 50)
        (None, 0.8)
    """

    def __init__(self) -> None:
        self.of_last = 0.0
        self._hard = 0.0
        self._steps = 0
        self._is_constant = False

    def update(self, hard: float, steps: int) -> float | None:
        """Adds steps; returns the share of those that were clipped hard if an episode begins, else `None`."""
        self.of_last += (1 - (1 - LAST_STEPS) ** steps) * (hard / steps - self.of_last)
        self._hard += hard
        self._steps += steps
        if self._steps < SHARE_STEPS:
            return None
        share, was_constant = self._hard / self._steps, self._is_constant
        self._hard, self._steps, self._is_constant = 0.0, 0, share > CONSTANT_CLIPPING
        return share if self._is_constant and not was_constant else None

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts, and whether an episode lasts."""
        counts = {"hard": self._hard, "steps": self._steps, "is_constant": self._is_constant}
        return {**counts, "of_last": self.of_last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self._hard, self._steps = state_dict["hard"], state_dict["steps"]
        self._is_constant = state_dict["is_constant"]
        self.of_last = state_dict.get("of_last", 0.0)  # version 0.5 has none
