"""Runs the same faults with tools that are used instead of the suite."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.callbacks.spike import SpikeDetection

from benchmarks.faults.classes import FAULTS, FaultClass
from benchmarks.faults.injection import Fault
from benchmarks.faults.runs import Case, epochs_of, fit, held_out, reference, state
from benchmarks.faults.tasks import MODELS


@dataclass(frozen=True)
class Baseline:
    """A tool against faults.

    Args:
        callbacks: Called for each run.
        arguments: Of the Trainer.
        on_gan: True if it works under manual optimization.
    """

    callbacks: Callable[[], list[pl.Callback]] = list
    arguments: tuple[tuple[str, Any], ...] = ()
    on_gan: bool = True


def _early_stopping() -> list[pl.Callback]:
    return [
        EarlyStopping("train_loss_epoch", patience=1000, check_finite=True, check_on_train_epoch_end=True)
    ]


#: By name; each as its users use it.
BASELINES = {
    "Lightning alone": Baseline(),
    "`gradient_clip_val=1`": Baseline(arguments=(("gradient_clip_val", 1.0),), on_gan=False),
    "`EarlyStopping(check_finite=True)`": Baseline(_early_stopping, on_gan=False),
    "`SpikeDetection`": Baseline(lambda: [SpikeDetection()], on_gan=False),
    "`detect_anomaly`": Baseline(arguments=(("detect_anomaly", True),)),
}


@dataclass(frozen=True)
class Answer:
    """The outcome of a fault with a baseline.

    Args:
        survived: As `Outcome.survived`.
        stopped: True if it ended the run.
        seconds: Duration of the run.
    """

    survived: bool
    stopped: bool
    seconds: float


def answer(name: str, case: Case) -> Answer:
    """Runs a case with a baseline in place of the suite."""
    baseline = BASELINES[name]
    start = time.perf_counter()
    untrained, best = reference(replace(case, kind="", check="exact"), 0)
    score, sane, stopped = math.nan, False, False
    with tempfile.TemporaryDirectory() as folder:
        fault = Fault(case.kind, *case.when, seed=case.seed, rank=0)
        try:
            module, trainer = fit(
                case,
                epochs_of(case, 0),
                Path(folder),
                lambda: [fault, *baseline.callbacks()],
                **dict(baseline.arguments),
            )
        except Exception:
            stopped = True
        else:
            stopped = trainer.should_stop
            sane = all(bool(torch.isfinite(tensor).all()) for tensor in state(module, trainer))
            score = module.eval().score(held_out())
    survived = not stopped and sane and score <= (untrained + best) / 2
    return Answer(survived, stopped, time.perf_counter() - start)


def cases(name: str) -> list[Case]:
    """No fault, and every survivable kind, in every model it fits, in float32, with SGD, in a steady run."""
    return [
        Case(kind, "steady", model, "SGD", fault.precision or "32-true", "exact", seed=0)
        for kind, fault in {"": FaultClass("nothing", ""), **FAULTS}.items()
        for model in MODELS
        if fault.survivable and fault.model in ("", model) and (BASELINES[name].on_gan or model != "GAN")
    ]
