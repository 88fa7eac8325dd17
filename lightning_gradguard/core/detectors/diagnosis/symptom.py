"""A symptom of training, its cause, and what follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from lightning_gradguard.core.detectors.constant_clipping import USUAL_UPDATE
from lightning_gradguard.core.incidents import Cause, IncidentKind, SymptomCause

#: What a symptom rests on, causes before their consequences.
Tier = Literal["contract", "coverage", "units", "update", "depth", "stuck", "stagnation"]


def describe_updates(share: float) -> str:
    """Returns small updates in words, with the rate at which they are as usual.

    Example:
        >>> describe_updates(3.1e-6)
        'updates are 3e-06 of the norm of the weights (usual: about 1e-3, at a rate 300 times as high)'
    """
    factor = f", at a rate {float(f'{USUAL_UPDATE / share:.1g}'):,.0f} times as high" if share > 0 else ""
    return f"updates are {share:.1g} of the norm of the weights (usual: about 1e-3{factor})"


def modules_of(names: Sequence[str]) -> tuple[str, ...]:
    """Returns the modules of parameters; a parameter beside modules, such as positions, itself."""
    owners = {name: name.rpartition(".")[0] or name for name in names}
    outer = {o for o in owners.values() if any(other.startswith(f"{o}.") for other in owners.values())}
    found = [name if owner in outer else owner for name, owner in owners.items()]
    return tuple(dict.fromkeys(sorted(found, key=lambda name: name in owners)))[:5]


@dataclass(frozen=True)
class Symptom:
    """A symptom of training with its cause.

    Args:
        kind: The kind of the incident that reports it.
        cause: `"unknown"` if no rule has found one.
        where: Names of layers, modules or parameters, the one at fault first.
        value: The measured number.
        evidence: The number in words, with what is usual.
        tier: What it rests on.
        needs: Samples that must show it.
        is_partial: True if it is of some weights, and others are as usual.
        n_times: Length of the sequences of a recurrent module, where it is of one.
        arguments: Answer and target of a loss as the user's code has them, where it is of one.
        since: The first step that showed it.
        followed_by: Symptoms that follow from it, and the steps of their own.
    """

    kind: IncidentKind
    cause: Cause | SymptomCause
    where: tuple[str, ...]
    value: float
    evidence: str
    tier: Tier
    needs: int = 2
    is_partial: bool = False
    n_times: int = 0
    arguments: tuple[str, ...] = ()
    since: int = 0
    followed_by: tuple[tuple[str, int], ...] = field(default=())

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Symptom:
        """Returns a symptom from its fields in a checkpoint, of which other versions have more or fewer.

        Example:
            >>> symptom = Symptom("stuck_loss", "unknown", ("head",), 1.0, "flat", "stuck")
            >>> Symptom.restored({**vars(symptom), "consecutive": True}) == symptom
            True
        """
        known = {field.name: saved[field.name] for field in fields(cls) if field.name in saved}
        for name in ("where", "arguments"):
            known[name] = tuple(known.get(name, ()))
        known["followed_by"] = tuple(map(tuple, known["followed_by"]))
        return cls(**known)

    @property
    def is_of_initialization(self) -> bool:
        """True for what the first weights explain: gradients through layers, and units, before they move."""
        is_of_weights = self.cause in ("small_weights", "large_weights", "saturating_activations", "depth")
        return self.since <= 1 and (is_of_weights or (self.tier == "units" and self.cause == "unknown"))

    def shown_since(self, step: int) -> Symptom:
        """Returns the symptom with the first step that showed it."""
        return replace(self, since=step)

    def explains(self, other: Symptom) -> bool:
        """True if another symptom follows from this one, or is the same.

        Example:
            >>> dead = Symptom("dead_units", "input_scale", ("net.0",), 1.0, "", "units")
            >>> stuck = Symptom("stuck_loss", "unknown", (), 1.0, "", "stuck")
            >>> dead.explains(stuck), stuck.explains(dead)
            (True, False)
        """
        if self.kind == "nonfinite_gradient" and other.kind == "exploding_gradient":
            return self.since <= other.since  # large numbers come before those that overflow
        if self.cause == other.cause != "unknown":
            return True
        if self.tier == "stuck" or self.tier == "stagnation":
            # recurrences are examined while the loss is flat, of which the cause is known
            is_known = self.cause != "unknown" and not self.is_partial
            is_collapse = self.cause == "same_answers"  # of which units may die
            follows = (is_collapse and other.tier == "units") or (is_known and other.cause == "through_time")
            return other.tier in ("stuck", "stagnation") or follows
        if self.tier == "coverage":
            return other.tier in ("coverage", "stuck", "stagnation")
        return other.tier != "coverage" and (self.tier == "contract" or other.tier != "contract")
