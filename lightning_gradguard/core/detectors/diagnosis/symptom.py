"""A symptom of training, its cause, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

#: What a symptom rests on, causes before their consequences.
Tier = Literal["contract", "coverage", "units", "update", "depth", "stuck", "stagnation"]


@dataclass(frozen=True)
class Symptom:
    """A symptom of training with its cause.

    Args:
        kind: One of `core.incidents.KINDS`.
        cause: One of `core.incidents.CAUSES`.
        where: Names of layers, modules or parameters, the one at fault first.
        value: The measured number.
        evidence: The number in words, with what is usual.
        tier: What it rests on.
        needs: Samples that must show it.
        consecutive: True if these must follow each other.
        since: The first step that showed it.
        followed_by: Symptoms that follow from it, and the steps of their own.
    """

    kind: str
    cause: str
    where: tuple[str, ...]
    value: float
    evidence: str
    tier: Tier
    needs: int = 2
    consecutive: bool = True
    since: int = 0
    followed_by: tuple[tuple[str, int], ...] = field(default=())

    def shown_since(self, step: int) -> Symptom:
        """Returns the symptom with the first step that showed it."""
        return replace(self, since=step)

    def explains(self, other: Symptom) -> bool:
        """True if another symptom follows from this one, or is the same.

        Example:
            >>> dead = Symptom("dead_units", "large_update", ("net.0",), 1.0, "", "units")
            >>> stuck = Symptom("stuck_loss", "unknown", (), 1.0, "", "stuck")
            >>> dead.explains(stuck), stuck.explains(dead)
            (True, False)
        """
        if self.cause == other.cause != "unknown":
            return True
        if self.tier == "stuck" or self.tier == "stagnation":
            return other.tier in ("stuck", "stagnation")
        if self.tier == "coverage":
            return other.tier in ("coverage", "stuck", "stagnation")
        return other.tier != "coverage" and (self.tier == "contract" or other.tier != "contract")
