"""One alarm for each episode of a condition that lasts."""

from __future__ import annotations

from typing import Any


class Persistence:
    """Turns a condition that is checked now and then into one alarm for each episode.

    Args:
        steps: Steps over which the condition must hold.
        checks: Consecutive checks at which it must hold.

    Example:
        >>> persistence = Persistence(steps=2, checks=3)
        >>> [persistence.update(step, holds=True) for step in range(5)]
        [False, False, True, False, False]
    """

    def __init__(self, steps: int = 20, checks: int = 3) -> None:
        self._steps = steps
        self._checks = checks
        self._value: bool | None = None
        self._since = 0
        self._n_checks = 0
        self._alarmed = False

    def update(self, step: int, holds: bool) -> bool:
        """Returns True at the check that recognizes an episode."""
        if holds is not self._value:
            self._value, self._since, self._n_checks = holds, step, 0
        self._n_checks += 1
        lasted = self._n_checks >= self._checks and step - self._since >= self._steps
        if not lasted:
            return False
        fresh = holds and not self._alarmed
        self._alarmed = holds
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """Returns how long the condition has held, and whether the alarm was raised."""
        return {
            "value": self._value,
            "since": self._since,
            "looks": self._n_checks,
            "alarmed": self._alarmed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with a saved episode."""
        self._value = state_dict["value"]
        self._since = state_dict["since"]
        self._n_checks = state_dict["looks"]
        self._alarmed = state_dict["alarmed"]
