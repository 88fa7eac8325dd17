"""Incidents: the only place where kinds, actions and causes are spelled, read back and put into words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

#: What the suite publishes; a callback of your own may publish others.
IncidentKind = Literal[
    "nonfinite_gradient",
    "nonfinite_loss",
    "nonfinite_weights",
    "nonfinite_buffers",
    "corrupted_gradient",
    "amp_overflow",
    "loss_spike",
    "divergence",
    "gradient_collapse",
    "rollback",
    "learning_rate_backoff",
    "training_diverged",
    "lost_batch",
    "vanishing_gradient",
    "exploding_gradient",
    "weight_stagnation",
    "stuck_loss",
    "dead_units",
    "saturated_units",
    "poor_initialization",
]
#: What was done about it.
Action = Literal["none", "skipped", "rolled_back", "backed_off", "repaired", "stopped"]
#: What made the first nonfinite value, as a replay finds it.
Cause = Literal[
    "bad_input",
    "corrupted_weights",
    "update_too_large",
    "forward_pass",
    "loss",
    "backward_pass",
    "transient",
    "unknown",
]
KINDS: tuple[IncidentKind, ...] = get_args(IncidentKind)
CAUSES: tuple[Cause, ...] = get_args(Cause)

#: Values that 0.5 and before wrote in other words.
_RENAMED = {"too large a step": "update_too_large", "weights": "corrupted_weights"}

_VALUE = {
    "nonfinite_gradient": "{:.0%} of the tensors",
    "loss_spike": "loss {:.4g}",
    "divergence": "loss {:.4g}",
    "gradient_collapse": "loss {:.4g}",
    "corrupted_gradient": "total norm {:.4g}",
    "rollback": "to the weights of step {:.0f}",
    "learning_rate_backoff": "learning rate times {:.4g}",
}


def current_name(value: str) -> Any:
    """An action or a cause as this version spells it, from a file of any version.

    Example:
        >>> current_name("rolled back"), current_name("too large a step"), current_name("skipped")
        ('rolled_back', 'update_too_large', 'skipped')
    """
    return _RENAMED.get(value, value.replace(" ", "_"))


def label(value: str) -> str:
    """A kind, an action or a cause as people read it.

    Example:
        >>> label("rolled_back")
        'rolled back'
    """
    return value.replace("_", " ")


class TrainingDivergedError(RuntimeError):
    """The run could not be kept alive: a budget of interventions is used up."""


@dataclass(frozen=True)
class Incident:
    """Something that a person should know, or that was done to the run.

    Published incidents reach every callback of the Trainer, and the LightningModule, that has a method
    `on_training_incident(trainer, pl_module, incident)`, on every rank alike.

    Args:
        kind: What it is, such as `"nonfinite_gradient"` or `"rollback"`; `core.incidents.KINDS` lists
            those of the suite.
        step: `trainer.global_step` when it happened.
        epoch: `trainer.current_epoch` when it happened.
        batch_idx: The batch of that epoch, or `None` outside of one.
        where: Names of the parameters or modules at fault, the worst first.
        value: The measured number that gave it away.
        action: What was done.
        advice: What a person can do.
        cause: What is at fault, if the batch was examined: one of `core.incidents.CAUSES`.
        detail: What was found out, in one sentence.
        dossier: Folder of the dossier, within that of the run, if one was written.

    Example:
        >>> incident = Incident("loss_spike", step=7, epoch=0, batch_idx=7, value=12.0)
        >>> incident.describe()
        'loss_spike at step 7 (epoch 0, batch 7): loss 12'
    """

    kind: str
    step: int
    epoch: int
    batch_idx: int | None
    where: tuple[str, ...] = ()
    value: float | None = None
    action: Action = "none"
    advice: str = ""
    cause: str = ""
    detail: str = ""
    dossier: str = ""

    @property
    def measured(self) -> str:
        """The value, as people read it; empty for none."""
        return "" if self.value is None else _VALUE.get(self.kind, "{:.4g}").format(self.value)

    def describe(self) -> str:
        """The incident in one line."""
        place = f" (epoch {self.epoch}" + (")" if self.batch_idx is None else f", batch {self.batch_idx})")
        parts = [f"{self.kind} at step {self.step}{place}"]
        facts = []
        if self.cause == "bad_input" and self.detail:
            facts.append(self.detail.rstrip("."))  # which samples to look at
        elif self.where:
            facts.append(first_names(3, self.where))
        if self.measured:
            facts.append(self.measured)
        if self.cause:
            facts.append(f"cause: {label(self.cause)}")
        if self.action != "none":
            facts.append(label(self.action))
        return ": ".join([*parts, "; ".join(facts)]) if facts else parts[0]


def first_names(n: int, names: Sequence[str]) -> str:
    """The first `n` names, and how many more there are."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more
