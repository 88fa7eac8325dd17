"""Incidents: the only module that declares kinds, actions and causes, reads them back, and words them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

#: The kinds that the suite publishes; other callbacks may publish others.
IncidentKind = Literal[
    "nonfinite_gradient",
    "nonfinite_loss",
    "nonfinite_weights",
    "nonfinite_buffers",
    "corrupted_gradient",
    "unequal_learning_rates",
    "amp_overflow",
    "loss_spike",
    "divergence",
    "gradient_collapse",
    "rollback",
    "learning_rate_backoff",
    "learning_rate_found",
    "training_diverged",
    "lost_batch",
    "rejected_step",
    "exception_in_step",
    "vanishing_gradient",
    "exploding_gradient",
    "weight_stagnation",
    "stuck_loss",
    "constant_clipping",
    "dead_units",
    "saturated_units",
    "vanishing_weights",
    "poor_initialization",
    "nonfinite_validation",
    "nonfinite_test",
]
#: The intervention of the suite; `stopped` is also that of an `EarlyStopping`.
Action = Literal["none", "skipped", "rolled_back", "backed_off", "repaired", "stopped"]
#: The origin of the first nonfinite value, as a replay finds it.
Cause = Literal[
    "bad_input",
    "corrupted_weights",
    "update_too_large",
    "forward_pass",
    "loss",
    "backward_pass",
    "optimizer_epsilon",
    "optimizer_step",
    "nonfinite_learning_rate",
    "compiled_code",
    "transient",
    "unknown",
]
#: Causes in the optimizer, or in code around its step, by which updates fail alike at any rate.
OF_OPTIMIZER: tuple[Cause, ...] = ("optimizer_epsilon", "optimizer_step", "nonfinite_learning_rate")
#: Causes that lie in the weights, which a rollback replaces.
OF_WEIGHTS: tuple[Cause, ...] = ("corrupted_weights", "update_too_large", *OF_OPTIMIZER)
#: Causes of nonfinite values that no learning rate avoids.
AT_ANY_RATE: tuple[Cause, ...] = (
    *("bad_input", "forward_pass", "loss", "backward_pass", "compiled_code"),
    *OF_OPTIMIZER,
)
#: The cause of a symptom, as a diagnosis finds it.
SymptomCause = Literal[
    "softmax_before_loss",
    "single_class",
    "not_log_probabilities",
    "broadcast_targets",
    "labels_ignored",
    "targets_out_of_range",
    "unreachable_targets",
    "single_value",
    "softmax_over_batch",
    "batch_as_time",
    "inverted_mask",
    "view_for_transpose",
    "dropout",
    "constant_loss",
    "tiny_gradient",
    "not_in_optimizer",
    "not_registered",
    "replaced_parameters",
    "detached",
    "never_stepped",
    "overwritten_weights",
    "cleared_gradients",
    "gradients_not_cleared",
    "frozen_weights",
    "zero_gradient",
    "learning_rate_too_low",
    "learning_rate_schedule",
    "rounded_updates",
    "input_scale",
    "constant_input",
    "constant_target",
    "unrelated_targets",
    "same_answers",
    "second_term",
    "target_scale",
    "data_scale",
    "small_weights",
    "large_weights",
    "large_answers",
    "saturating_activations",
    "saturating_loss",
    "large_logits",
    "depth",
    "through_time",
    "padding",
    "inactive_output",
    "scaled_gradients_clipped",
    "clip_value_too_small",
    "weight_decay",
    "unbounded_loss",
]
KINDS: tuple[IncidentKind, ...] = get_args(IncidentKind)
CAUSES: tuple[Cause, ...] = get_args(Cause)
SYMPTOM_CAUSES: tuple[SymptomCause, ...] = get_args(SymptomCause)

#: Beginning of advice that the check of the initialization has tried on a batch.
CURE = "Cure: "
#: Good steps after which a level that a search tries counts as one that trains.
TRIAL_STEPS = 60
#: What was measured of a learning rate that a run has found, and not rolled back since.
HELD = f"at which the loss fell over {TRIAL_STEPS} steps, and no rollback followed"
#: File in the folder of a second logger, with the path from there to the folder that has the incidents.
RUN_FOLDER = "run_folder.txt"
#: Values in files of 0.5 and before that are renamed since.
_RENAMED = {"too large a step": "update_too_large", "weights": "corrupted_weights"}

#: Kinds, and symptoms that only a report finds, that read otherwise than they are spelled.
_TITLES = {
    "exploding_gradient": "exploding gradients",
    "vanishing_gradient": "vanishing gradients",
    "gradient_collapse": "collapsed gradients",
    "nonfinite_gradient": "nonfinite gradients",
    "nonfinite_validation": "nonfinite validation metric",
    "nonfinite_test": "nonfinite test metric",
    "training_diverged": "training stopped",
    "nonfinite_buffers": "corrupted buffers",
    "amp_overflow": "float16 overflow",
    "constant_clipping": "clipping of most steps",
    "exception_in_step": "exception in the step",
    "falling_learning_rate": "a learning rate that keeps falling",
    "large_norm": "a gradient norm out of scale",
    "little_learned": "little or nothing learned",
    "rising_loss": "a loss that rises",
}
#: Causes that are found in what a loss is given, also while it falls.
_OF_ARGUMENTS: tuple[SymptomCause, ...] = (
    *("softmax_before_loss", "not_log_probabilities", "softmax_over_batch", "broadcast_targets"),
    *("labels_ignored", "targets_out_of_range", "unreachable_targets"),
)
#: Interventions on the console, with the value of the incident.
_INTERVENTIONS = {
    "rollback": "Rolled back to step {:.0f}",
    "learning_rate_backoff": "Learning rate backed off to {:.4g}x the configured rate",
    "learning_rate_found": f"The loss fell over {TRIAL_STEPS} steps with lr={{:.3g}},",
}
_VALUES = {
    "nonfinite_gradient": "{:.0%} of the gradients",
    "loss_spike": "loss {:.4g}",
    "divergence": "loss {:.4g}",
    "gradient_collapse": "loss {:.4g}",
    "corrupted_gradient": "total norm {:.4g}",
    "rejected_step": "total norm {:.4g}",
    "rollback": "to step {:.0f}",
    "learning_rate_backoff": "{:.4g}x the configured rate",
    "learning_rate_found": "lr={:.3g}",
    "constant_clipping": "{:.0%} of the steps to less than half of their norm",
    "nonfinite_loss": "loss {:.4g}",
}
#: Kinds of a diagnosis, which has the number that shows one in words, as it is another one for each cause.
_IN_DETAIL = (
    *("vanishing_gradient", "exploding_gradient", "weight_stagnation", "stuck_loss"),
    *("dead_units", "saturated_units", "vanishing_weights", "constant_clipping"),
)


def current_name(value: str) -> Any:
    """Returns an action or a cause as this version spells it, from a file of any version.

    Example:
        >>> current_name("rolled back"), current_name("too large a step"), current_name("skipped")
        ('rolled_back', 'update_too_large', 'skipped')
    """
    return _RENAMED.get(value, value.replace(" ", "_"))


def label(value: str) -> str:
    """Returns a kind, an action or a cause in words, such as `rolled back` for `"rolled_back"`."""
    return value.replace("_", " ")


def title(kind: str, cause: str = "") -> str:
    """Returns the name of an incident or a symptom as people call it, such as `exploding gradients`.

    Example:
        >>> title("stuck_loss"), title("stuck_loss", "softmax_before_loss")
        ('stuck loss', 'misused loss')
    """
    is_misused = kind == "stuck_loss" and cause in _OF_ARGUMENTS
    return "misused loss" if is_misused else _TITLES.get(kind, label(kind))


class TrainingDivergedError(RuntimeError):
    """Raised when a budget of interventions is used up."""


@dataclass(frozen=True)
class Incident:
    """An event worth a person's attention, or an intervention in the run.

    Published incidents reach every callback of the Trainer, and the LightningModule, that has a method
    `on_training_incident(trainer, pl_module, incident)`, on every rank alike.

    Args:
        kind: Such as `"nonfinite_gradient"` or `"rollback"`; `core.incidents.KINDS` lists those of the suite.
        step: `trainer.global_step` at the incident.
        epoch: `trainer.current_epoch` at the incident.
        batch_idx: Index of the batch within the epoch, or `None` outside of one.
        where: Names of the parameters, modules or parts of the batch at fault, the worst first; the line of
            the step's own code, if the fault is there.
        value: The measured number.
        action: The intervention.
        advice: What a person can do.
        cause: The origin of a nonfinite value, if the batch was examined, or the cause of a symptom; empty if
            unknown.
        detail: Result of the examination, or the numbers that show a symptom, in one sentence.
        dossier: Folder of the dossier, within that of the run, if one was written.
        location: File, line and function of the user's code that ran the operation at fault, if it is known.
        examined: False for a skipped batch that was not run again, as it follows one that was.
        samples: The first rows of the batch at fault, with their names or indices in the data set, if known.

    Example:
        >>> incident = Incident("loss_spike", step=7, epoch=0, batch_idx=7, value=12.0)
        >>> incident.describe()
        'Loss spike at step 7 (epoch 0, batch 7): loss 12'
    """

    kind: IncidentKind | str
    step: int
    epoch: int = 0
    batch_idx: int | None = None
    where: tuple[str, ...] = ()
    value: float | None = None
    action: Action = "none"
    advice: str = ""
    cause: Cause | SymptomCause | Literal[""] = ""
    detail: str = ""
    dossier: str = ""
    location: str = ""
    examined: bool = True
    samples: str = ""

    @property
    def measured(self) -> str:
        """The value with its name and unit, or the detail that has them; empty for none."""
        is_in_detail = self.kind in _IN_DETAIL or (self.kind not in _VALUES and self.value is not None)
        if self.detail and is_in_detail:
            return self.detail.rstrip(".")
        if self.value is None:
            return ""
        return _VALUES.get(self.kind, "value {:.4g}").format(self.value)

    @property
    def is_explained(self) -> bool:
        """True if its cause is known, or its advice has been tried."""
        return self.cause not in ("", "transient", "unknown") or self.advice.startswith(CURE)

    @property
    def is_of_depth(self) -> bool:
        """True if the network is too deep, and no trial of other weights is its advice."""
        return self.cause == "depth" and not self.advice.startswith(CURE)

    def describe(self) -> str:
        """Returns the incident in one line."""
        batch = "" if self.batch_idx is None else f", batch {self.batch_idx}"
        at = f" at step {self.step} (epoch {self.epoch}{batch})"
        if self.kind in _INTERVENTIONS and self.value is not None:
            return _INTERVENTIONS[self.kind].format(self.value) + at
        facts = []
        if self.cause == "bad_input" and self.detail:
            facts.append(self.detail.rstrip("."))  # names the samples
        elif self.where:
            facts.append(first_names(3, self.where))
        if self.location and self.location not in self.where and self.location not in "".join(facts):
            facts.append(self.location)
        if self.samples and self.cause != "bad_input":
            facts.append(self.samples)
        if self.measured and self.measured not in facts:
            facts.append(self.measured)
        if self.cause:
            facts.append(f"cause: {label(self.cause)}")
        if self.action != "none":
            facts.append(label(self.action))
        return sentence_case(title(self.kind, self.cause)) + at + (f": {'; '.join(facts)}" if facts else "")


def sentence_case(text: str) -> str:
    """Returns a text with a capital first letter, but for the name of a function, and the others unchanged.

    Example:
        >>> sentence_case("the loss is flat"), sentence_case("mse_loss: targets are large")
        ('The loss is flat', 'mse_loss: targets are large')
    """
    return text if "_" in text.partition(" ")[0] else text[:1].upper() + text[1:]


def first_names(n: int, names: Sequence[str]) -> str:
    """Returns the first `n` names and the number of the others."""
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(names[:n]) + more
