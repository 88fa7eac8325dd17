"""Runs one program without the suite, and with its defaults."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.quiet_trainer import QUIET
from benchmarks.third_party import at51, regression, twins
from benchmarks.third_party.programs import Case
from lightning_gradguard import Incident, default_callbacks

CASES: dict[tuple[str, str], Case] = {
    (case.benchmark, case.name): case for case in (*at51.cases(), *twins.cases(), *regression.cases())
}
#: Incidents that say how to begin better, and nothing of the run.
ADVICE = frozenset({"poor_initialization", "amp_overflow"})
#: Incidents that are interventions by their kind.
INTERVENTIONS = frozenset({"rollback", "learning_rate_backoff", "learning_rate_found", "training_diverged"})
Severity = Literal["advice", "warning", "intervention"]


@dataclass(frozen=True)
class Record:
    """The outcome of one program.

    Args:
        benchmark: Its name.
        name: Of the program.
        seed: Of data and weights.
        bare: Score without callbacks; `None` if nonfinite.
        suite: Score with the defaults; `None` if nonfinite.
        incidents: Kind, cause, step, first place, action.
        error: Name of the exception that ended the run with the suite.
    """

    benchmark: str
    name: str
    seed: int
    bare: float | None
    suite: float | None
    incidents: list[dict[str, Any]]
    error: str


def severity(incident: dict[str, Any]) -> Severity:
    """Returns how far an incident goes."""
    if incident["action"] != "none" or incident["kind"] in INTERVENTIONS:
        return "intervention"
    return "advice" if incident["kind"] in ADVICE else "warning"


class _Listener(pl.Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
        record = {
            "kind": incident.kind,
            "cause": incident.cause,
            "step": incident.step,
            "where": incident.where[0] if incident.where else "",
            "action": incident.action,
        }
        if record not in self.found:
            self.found.append(record)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(io.StringIO()):
            yield


def _train(case: Case, seed: int, callbacks: list[Any]) -> tuple[float | None, str]:
    made = case.make(seed)
    torch.manual_seed(seed)
    error = ""
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            **QUIET, max_epochs=1, default_root_dir=folder, callbacks=callbacks, log_every_n_steps=10
        )
        try:
            trainer.fit(made.module, DataLoader(made.batches, batch_size=None))  # type: ignore[arg-type]
        except Exception as raised:
            error = type(raised).__name__
        score = made.score()
    return (score if math.isfinite(score) else None), error


def run(key: tuple[str, str], seed: int) -> Record:
    """Runs a program twice."""
    case, listener = CASES[key], _Listener()
    bare, _ = _train(case, seed, [])
    suite, error = _train(case, seed, [*default_callbacks(), listener])
    return Record(case.benchmark, case.name, seed, bare, suite, listener.found, error)
