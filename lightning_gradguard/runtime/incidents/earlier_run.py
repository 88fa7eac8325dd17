"""Keeps the records of an earlier run apart from those of one that begins anew in the same folder."""

from __future__ import annotations

from contextlib import suppress

import pytorch_lightning as pl

from lightning_gradguard.runtime.incidents.journal import count_incidents, incidents_file


def set_aside_earlier_run(trainer: pl.Trainer) -> None:
    """Renames records in the logger's folder, such as of a fixed `version`, if this run resumes none of them.

    A folder that was named for them may be that of several runs at a time, and is left as it is.
    """
    file = incidents_file(trainer)
    if file is None or trainer.global_step > 0 or count_incidents(trainer):
        return
    if str(file.parent) in [str(logger.log_dir) for logger in trainer.loggers if hasattr(logger, "log_dir")]:
        for earlier in (file, *file.parent.glob("lost_batches.rank*.jsonl")):
            with suppress(OSError):  # most folders are new
                earlier.replace(f"{earlier}.1")
