"""A program that can be run again and again: its module, its recorded batches, its Trainer."""

from __future__ import annotations

import copy
import logging
import math
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from lightning_gradguard.core.forensics.location import innermost_of_traceback
from lightning_gradguard.runtime.lightning_packages import FRAMEWORKS, lightning_package_of, without_output
from lightning_gradguard.runtime.logging.silence import messages_silenced
from lightning_gradguard.treatment.trials.recording import Batches, Recorded, RecordedBatches, Recorder

#: Arguments of a Trainer that a trial takes from the user.
OF_USER = (
    *("accelerator", "precision", "gradient_clip_val", "gradient_clip_algorithm", "accumulate_grad_batches"),
    *("deterministic", "benchmark", "use_distributed_sampler", "detect_anomaly", "inference_mode"),
    *("sync_batchnorm", "check_val_every_n_epoch", "val_check_interval"),
)
#: Arguments for the length of a run.
LENGTH = ("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches")
_PACKAGE = str(Path(__file__).parents[2])


class TreatmentError(Exception):
    """A program cannot be treated; the message names the reason and the remedy in one line."""


@dataclass(frozen=True)
class Program:
    """A program with everything that a trial needs.

    Args:
        make_module: Builds the module anew.
        datamodule: The data module, whose hooks for batches are called; `None` if the module has loaders.
        trainer: Arguments of the user's Trainer.
        batches: What the trials train on.
        planned: Optimizer steps of the user's run; 0 if unknown.
        batches_per_step: Batches of an optimizer step; below 1 where several optimizers step in each.
        seed: Of the search.
        reachable: Loss over that of the best constant answer that plain learners reach; NaN if unknown.
    """

    make_module: Callable[[], pl.LightningModule]
    datamodule: Any
    trainer: Mapping[str, Any]
    batches: RecordedBatches
    planned: int
    batches_per_step: float
    seed: int
    reachable: float = math.nan

    def module(self, seed: int) -> pl.LightningModule:
        """Builds the module with a seed; callbacks of its own are omitted."""
        module = built(self.make_module, seed)
        module.configure_callbacks = list  # type: ignore[method-assign]
        return module

    def trainer_of(
        self, module: pl.LightningModule, callbacks: Sequence[Any], steps: int, folder: str, **more: Any
    ) -> pl.Trainer:
        """Returns a Trainer for a number of optimizer steps that prints and keeps nothing."""
        n_batches = self.n_batches(steps)
        if len(self.batches.epochs[0]) > n_batches:
            more["val_check_interval"] = n_batches
        length = {"max_steps": steps, "max_epochs": -1}
        return _trainer(module, self.trainer, folder, **more, **length, callbacks=list(callbacks))

    def n_batches(self, steps: int) -> int:
        """Returns the batches of a number of optimizer steps."""
        return max(round(steps * self.batches_per_step), 1)

    def with_manual_steps(self, batches: int, steps: int) -> Program:
        """Returns the program as a run of it has shown how many steps of its own it makes in its batches."""
        ratio = batches / steps
        is_of_steps = self.trainer.get("max_steps") not in (None, -1)
        planned = self.planned if is_of_steps else round(self.planned / ratio)
        return replace(self, planned=planned, batches_per_step=ratio)

    def fit(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Trains on the recorded batches."""
        validation: Any = [Batches([loader]) for loader in self.batches.validation if loader]
        validation = validation[0] if len(validation) == 1 else validation
        train = Batches(self.batches.epochs)
        if self.datamodule is None:
            trainer.fit(module, train, validation or None)
            return
        served = copy.copy(self.datamodule)
        served.trainer = None
        nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
        served.prepare_data = served.setup = served.teardown = nothing
        served.train_dataloader = lambda: train
        served.val_dataloader = lambda: validation
        trainer.fit(module, datamodule=served)


def built(make_module: Callable[[], pl.LightningModule], seed: int) -> pl.LightningModule:
    """Builds a module with a seed.

    Raises:
        TreatmentError: If it cannot be built.
    """
    seed_all(seed)
    try:
        return make_module()
    except Exception as error:  # the user's own code
        raise TreatmentError(f"the module could not be built: {described(error)}") from error


def seed_all(seed: int) -> None:
    """Seeds torch, NumPy and Python, without the environment variable that Lightning sets."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def described(error: BaseException) -> str:
    """Returns an exception in one line of at most 300 characters, with the line of the user's code."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    place = innermost_of_traceback(error.__traceback__, (*FRAMEWORKS, _PACKAGE))
    return f"{text[:297] + '...' if len(text) > 300 else text}{f' ({place})' if place else ''}"


def recorded_program(
    make_module: Callable[[], pl.LightningModule],
    datamodule: Any,
    trainer: Mapping[str, Any],
    seed: int,
    wanted: int,
    deadline: float,
) -> Program:
    """Builds a module twice, and records the `wanted` number of batches of its training.

    There are fewer at the deadline, on the clock of `time.monotonic`.

    Raises:
        TreatmentError: If the module cannot be built twice, or there are no batches.
    """
    if isinstance(make_module, torch.nn.Module):
        kind = type(make_module).__name__
        raise TreatmentError(
            f"make_module is a {kind}, and no function that builds one: lambda: {kind}(...)."
        )
    if datamodule is not None and not hasattr(datamodule, "train_dataloader"):
        raise TreatmentError(
            f"datamodule is a {type(datamodule).__name__}, and no LightningDataModule: pass one, such as "
            "LightningDataModule.from_datasets(train_dataset, batch_size=32)."
        )
    module, again = built(make_module, seed), built(make_module, seed)
    if module is again or {id(p) for p in module.parameters()} & {id(p) for p in again.parameters()}:
        raise TreatmentError(
            "make_module gives the same module, or the same parameters, each time; have it build a new one."
        )
    module.configure_callbacks = list  # type: ignore[method-assign]
    recorder = Recorder(wanted, deadline)
    length = {name: trainer[name] for name in LENGTH if trainer.get(name) is not None}
    with messages_silenced(logging.CRITICAL), tempfile.TemporaryDirectory() as folder:
        fitting = _trainer(module, trainer, folder, **length, callbacks=[recorder])
        seed_all(seed)
        try:
            if datamodule is None:
                fitting.fit(module)
            else:
                fitting.fit(module, datamodule=datamodule)
        except Recorded:
            pass
        except Exception as error:  # the user's own code
            raise TreatmentError(f"the data could not be read: {described(error)}") from error
    if not recorder.epochs or not recorder.epochs[0]:
        raise TreatmentError("there is no training batch.")
    is_given = any(trainer.get(name) not in (None, -1) for name in ("max_epochs", "max_steps"))
    planned = int(recorder.steps) if is_given and math.isfinite(recorder.steps) else 0
    accumulated = int(trainer.get("accumulate_grad_batches") or 1)
    return Program(make_module, datamodule, trainer, recorder.result(), planned, accumulated, seed)


def _trainer(
    module: pl.LightningModule, settings: Mapping[str, Any], folder: str, **arguments: Any
) -> pl.Trainer:
    """Returns a Trainer with settings of the user that prints and keeps nothing."""
    package = lightning_package_of(type(module))
    used = {name: value for name, value in settings.items() if name in OF_USER and value is not None}
    fixed = {
        "accelerator": "auto" if torch.cuda.is_available() else "cpu",
        "devices": 1,
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
        **without_output(package),
    }
    trainer: pl.Trainer = package.Trainer(**{**fixed, **used, **arguments})
    return trainer
