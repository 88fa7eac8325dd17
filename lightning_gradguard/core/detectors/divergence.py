"""Detectors of finite training that will not come back by itself: it has diverged, or its units have died."""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Any

#: Steps over which loss and norm are taken together, and for which a collapse has to last.
STEPS = 10
#: How much the loss has to rise before anything is said.
LEAST_RISE = 1.5


class DivergenceDetector:
    """Says by how much loss and gradient norm are worse than in the first steps of training.

    The medians of ten steps are compared with those of the first ten, or with the very first step if that was
    better: no update had been made before it. The loss has to be at least one and a half times as large to
    say anything; what is said is its ratio times that of the norm: a loss that rises a little while norms
    explode counts. A loss that rises alone, as in a saturated network, counts as if the norm had risen as
    much. Nonpositive losses are no measure.

    Example:
        >>> detector = DivergenceDetector()
        >>> [detector.update(2.0, 1.0) for _ in range(50)][-1]
        0.0
        >>> [detector.update(20.0, 1000.0) for _ in range(10)][-1]
        10000.0
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=STEPS)
        self._norms: deque[float] = deque(maxlen=STEPS)
        self._start: tuple[float, float] | None = None

    def update(self, loss: float, total_norm: float) -> float:
        """Take in a step whose numbers are finite; returns how many times worse it is, 0 if it is not."""
        self._losses.append(loss)
        self._norms.append(total_norm)
        if len(self._losses) < STEPS:
            return 0.0
        now = (median(self._losses), median(self._norms))
        if self._start is None:
            self._start = (min(now[0], self._losses[0]), min(now[1], self._norms[0]))
        if min(self._start) <= 0:
            return 0.0
        loss_ratio, norm_ratio = (value / start for value, start in zip(now, self._start, strict=True))
        return loss_ratio * max(norm_ratio, loss_ratio) if loss_ratio >= LEAST_RISE else 0.0

    def forget(self) -> None:
        """The weights were put back: what was seen of others says nothing about them."""
        self._losses.clear()
        self._norms.clear()

    def state_dict(self) -> dict[str, Any]:
        """The last steps, and the first."""
        return {"losses": list(self._losses), "norms": list(self._norms), "start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with saved steps."""
        self._losses = deque(state_dict["losses"], maxlen=STEPS)
        self._norms = deque(state_dict["norms"], maxlen=STEPS)
        self._start = state_dict["start"]


class CollapseDetector:
    """Says whether a network that was alive has died.

    When all units of a layer have died, no weight matrix gets a gradient any more, while the last bias still
    does. Ten such steps in a row are a collapse; it does not heal.

    Example:
        >>> detector = CollapseDetector()
        >>> any(detector.update(is_dead) for is_dead in [False] + [True] * 9)
        False
        >>> detector.update(True)
        True
    """

    def __init__(self) -> None:
        self._was_alive = False
        self._in_a_row = 0

    def update(self, is_collapsed: bool) -> bool:
        """Take in a step.

        Args:
            is_collapsed: Whether no weight matrix gets a gradient, while something else does.
        """
        self._was_alive = self._was_alive or not is_collapsed
        self._in_a_row = self._in_a_row + 1 if is_collapsed and self._was_alive else 0
        return self._in_a_row >= STEPS

    def forget(self) -> None:
        """The weights were put back."""
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Whether it was alive, and how long it has not been."""
        return {"was_alive": self._was_alive, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with what was remembered."""
        self._was_alive = state_dict["was_alive"]
        self._in_a_row = state_dict["in_a_row"]
