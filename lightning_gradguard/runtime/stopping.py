"""What is left when training is stopped: a checkpoint of the last good state, and a reason."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl

from lightning_gradguard.core.diagnosis import advice
from lightning_gradguard.runtime import reporting
from lightning_gradguard.runtime.incidents import TrainingDivergedError, incidents_file, run_folder

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
        trainer.save_checkpoint(folder / LAST_GOOD)
    except OSError as error:
        reporting.say(trainer, f"gradguard: {folder / LAST_GOOD} was not written: {error}")
        return None
    return folder / LAST_GOOD


def diverged(
    trainer: pl.Trainer, step: int, interventions: str, last_good: Path | None
) -> TrainingDivergedError:
    """The error that ends the run.

    Args:
        trainer: The Trainer that is stopped.
        step: `trainer.global_step` of the weights that it is left with.
        interventions: What was done before, with the budgets.
        last_good: From `save_last_good`.
    """
    left = [str(path) for path in (incidents_file(trainer), last_good) if path]
    return TrainingDivergedError(
        f"Training was stopped at step {trainer.global_step} after {interventions}; weights are those of "
        f"step {step}, the last that were proven good. {advice('training_diverged')}"
        + (f" What happened, and where to resume from: {', '.join(left)}" if left else "")
    )
