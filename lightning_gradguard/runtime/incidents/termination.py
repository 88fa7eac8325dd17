"""Stops training: a checkpoint of the last good state, and an error with the reason."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import pytorch_lightning as pl

from lightning_gradguard.core.forensics import Origin
from lightning_gradguard.core.incidents import AT_ANY_RATE, Cause, TrainingDivergedError, label
from lightning_gradguard.core.recovery import RecoveryPolicy
from lightning_gradguard.core.remedies import Present, advice
from lightning_gradguard.runtime.configured_rates import initial_rate
from lightning_gradguard.runtime.incidents.journal import incidents_file, run_folder
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.optimizer_hooks import largest_usual_rate

#: Name of the checkpoint.
LAST_GOOD = "last_good.ckpt"


def save_last_good(trainer: pl.Trainer) -> Path | None:
    """Writes a checkpoint of the present state into the run's folder. Collective: called on every rank.

    Returns the file; `None` if there is no folder, or it cannot be written.
    """
    folder = run_folder(trainer)
    if folder is None:
        return None
    try:
        trainer.save_checkpoint(folder / LAST_GOOD, weights_only=False)
    except OSError as error:
        console.print_message(trainer, f"{folder / LAST_GOOD} was not written: {error}")
        return None
    return folder / LAST_GOOD


def combined_advice(causes: Mapping[Cause, Origin], present: Collection[Present]) -> str:
    """Returns advice on a run that was stopped."""
    advices = dict.fromkeys(origin.remedy(present) for origin in causes.values())
    return " ".join(filter(None, advices)) or advice("training_diverged", present=present)


def divergence_error(
    trainer: pl.Trainer,
    policy: RecoveryPolicy,
    step: int,
    causes: Mapping[Cause, Origin],
    last_good: Path | None,
    weights: str,
    learning_rate_scale: float,
) -> TrainingDivergedError:
    """Makes the error that ends the run.

    Its first line gives the reason if no step was ever finite. It happens at `step`, counted as in incidents;
    `weights` are those of the module now. The rates of the run were multiplied by `learning_rate_scale` at
    last.
    """
    causes_text = "; ".join(
        f"{label(cause)} ({', '.join(origin.where[:3])})" if origin.where else label(cause)
        for cause, origin in causes.items()
    )
    found = next((origin.detail for origin in [*causes.values()][::-1] if origin.detail), "")
    was_finite = policy.has_good_step or policy.stopped_at_first
    headline = "" if was_finite else f"No step was ever finite. {found}".rstrip() + "\n"
    left = [str(path) for path in (incidents_file(trainer), last_good) if path]
    return TrainingDivergedError(
        f"{headline}Training was stopped at step {step}: {policy.stop_reason}."
        + (f" Causes: {causes_text}." if causes_text else "")
        + f" {combined_advice(causes, present_in(trainer))} The weights are {weights}."
        + (f" Incidents and checkpoint to resume from: {', '.join(left)}" if left else "")
        + (
            f". {_how_to_resume(trainer, last_good, learning_rate_scale, causes)}"
            if last_good and was_finite
            else ""
        )
    )


def _how_to_resume(trainer: pl.Trainer, last_good: Path, scale: float, causes: Collection[Cause]) -> str:
    call = f"trainer.fit(module, ckpt_path='{last_good}')"
    if causes and all(cause in AT_ANY_RATE for cause in causes):
        return f"To resume, correct that and call {call}"
    group = trainer.optimizers[0].param_groups[0]
    name = "max_lr" if "max_lr" in group else "lr"  # OneCycleLR sets the others by it
    rate = float(group.get("max_lr", initial_rate(group)))
    used = "" if scale == 1 else f", at last scaled by {scale:.3g}"
    lower = min(rate * scale / 10, largest_usual_rate(trainer.optimizers[0]))
    return (
        f"To resume at a lower learning rate, set it in configure_optimizers (it was {name}={rate:g}{used}; "
        f"try {name}={lower:.2g}) and call {call}: "
        "NaNRollback puts the rate of the code in place of that in the checkpoint."
    )
