"""Runs one program under one guard in a real Trainer."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarks.evidence.failing import SCENARIOS as FAILING
from benchmarks.evidence.guards import GUARDS, clipping_of
from benchmarks.evidence.healthy import SCENARIOS as HEALTHY
from benchmarks.quiet_trainer import QUIET
from lightning_gradguard import AdaptiveGradientClipping, Incident, LearningRateBackoff, NaNRollback
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback

SCENARIOS = {scenario.name: scenario for scenario in (*HEALTHY, *FAILING)}
#: Steps in which a policy may bound what it has not seen before.
FIRST = 20


@dataclass(frozen=True)
class Record:
    """The outcome of one run.

    Args:
        scenario: Its name.
        guard: Its name.
        seed: Of data and weights.
        score: After training, or when it was stopped; `None` if it is nonfinite.
        clipped: Share of the steps after the first 20 that were clipped; `None` without our callback.
        clipped_first: Number of the first 20 steps that were clipped.
        skips: Skipped steps.
        rollbacks: Rollbacks.
        rate_scale: Factor on the learning rate at the end.
        kinds: Kinds of incidents.
        error: Name of the exception that ended the run.
        seconds: Of the fit.
    """

    scenario: str
    guard: str
    seed: int
    score: float | None
    clipped: float | None
    clipped_first: int
    skips: int
    rollbacks: int
    rate_scale: float
    kinds: list[str]
    error: str
    seconds: float


class _Watch(StepCallback):
    """Counts clipped steps, by what the policies did; and incidents."""

    def __init__(self, clipping: AdaptiveGradientClipping) -> None:
        super().__init__()
        self.clipping = clipping
        self.first: dict[int, int] = {}
        self.counts = [0, 0, 0]
        self.kinds: set[str] = set()

    @override
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        index = step.optimizer_index
        number = self.first[index] = self.first.get(index, 0) + 1
        clipped, _ = self.clipping._clipped.get(index, (0, 0))
        is_clipped = float(clipped) > self._before.get(index, 0)
        self._before[index] = float(clipped)
        if number <= FIRST:
            self.counts[0] += is_clipped
        else:
            self.counts[1] += is_clipped
            self.counts[2] += 1

    _before: dict[int, float] = {}

    def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
        self.kinds.add(incident.kind)


@contextlib.contextmanager
def _quiet() -> Any:
    levels = {name: logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")}
    for logger in levels.values():
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def run(scenario: str, guard: str, seed: int) -> Record:
    """Runs a scenario under a guard."""
    made = SCENARIOS[scenario].make(seed)
    is_automatic = made.module.automatic_optimization
    callbacks = GUARDS[guard].callbacks() if is_automatic or not GUARDS[guard].is_automatic else []
    clipping = clipping_of(callbacks)
    watch = None if clipping is None else _Watch(clipping)
    if watch is not None:
        watch._before = {}
        callbacks.append(watch)
    torch.manual_seed(seed)
    error, start = "", time.perf_counter()
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **QUIET,
            max_epochs=1,
            default_root_dir=folder,
            callbacks=callbacks,
            gradient_clip_val=GUARDS[guard].clip if is_automatic else None,
            log_every_n_steps=10**9,
        )
        try:
            trainer.fit(made.module, DataLoader(made.batches, batch_size=None))  # type: ignore[arg-type]
        except Exception as raised:
            error = type(raised).__name__
    seconds = time.perf_counter() - start
    score = made.score()
    by_type = {type(callback): callback for callback in callbacks}
    rollback, backoff = by_type.get(NaNRollback), by_type.get(LearningRateBackoff)
    return Record(
        scenario=scenario,
        guard=guard,
        seed=seed,
        score=score if math.isfinite(score) else None,
        clipped=None if watch is None else watch.counts[1] / max(watch.counts[2], 1),
        clipped_first=0 if watch is None else watch.counts[0],
        skips=rollback.skips if isinstance(rollback, NaNRollback) else 0,
        rollbacks=rollback.rollbacks if isinstance(rollback, NaNRollback) else 0,
        rate_scale=backoff.scale if isinstance(backoff, LearningRateBackoff) else 1.0,
        kinds=[] if watch is None else sorted(watch.kinds),
        error=error,
        seconds=round(seconds, 2),
    )


def as_line(record: Record) -> dict[str, Any]:
    """Returns a record as JSON has it."""
    return asdict(record)
