"""What is left when training is stopped: a checkpoint of the last good state, and a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytorch_lightning as pl

from lightning_gradguard.core.incidents import Cause, TrainingDivergedError, label
from lightning_gradguard.core.remedies import advice, advice_for_cause
from lightning_gradguard.runtime.incidents.journal import incidents_file, run_folder
from lightning_gradguard.runtime.logging import console

#: Name of the checkpoint.
LAST_GOOD = "last_good.ckpt"


def save_last_good(trainer: pl.Trainer) -> Path | None:
    """Write the Trainer's state into the run's folder, from which training can be resumed. On all ranks.

    Returns:
        The file; `None` if there is no folder, or it cannot be written.
    """
    folder = run_folder(trainer)
    if folder is None:
        return None
    try:
        trainer.save_checkpoint(folder / LAST_GOOD, weights_only=False)
    except OSError as error:
        console.print_message(trainer, f"gradguard: {folder / LAST_GOOD} was not written: {error}")
        return None
    return folder / LAST_GOOD


def combined_advice(causes: Mapping[Cause, Sequence[str]]) -> str:
    """What to do about a run that was stopped.

    Args:
        causes: What was found out about lost steps, and where.
    """
    advices = [advice_for_cause(cause, tuple(where)) for cause, where in causes.items()]
    return " ".join(filter(None, advices)) or advice("training_diverged")


def diverged(
    trainer: pl.Trainer,
    reason: str,
    step: int,
    causes: Mapping[Cause, Sequence[str]],
    last_good: Path | None,
) -> TrainingDivergedError:
    """The error that ends the run.

    Args:
        trainer: The Trainer that is stopped.
        reason: Which budget was used up.
        step: `trainer.global_step` of the weights that it is left with.
        causes: What was found out about lost steps, and where.
        last_good: From `save_last_good`.
    """
    told = "; ".join(
        f"{label(cause)} ({', '.join(where[:3])})" if where else label(cause)
        for cause, where in causes.items()
    )
    left = [str(path) for path in (incidents_file(trainer), last_good) if path]
    return TrainingDivergedError(
        f"Training was stopped at step {trainer.global_step}: {reason}."
        + (f" Causes: {told}." if told else "")
        + f" {combined_advice(causes)} Weights are those of step {step}, the last that were proven good."
        + (f" What happened, and where to resume from: {', '.join(left)}" if left else "")
    )
