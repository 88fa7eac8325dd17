"""The file of incidents: which runs write one, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from torch import Tensor

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GlobalNormClipping,
    GradientNormMonitor,
    NaNRollback,
)
from lightning_gradguard.report.readers.incident_files import read_incidents
from lightning_gradguard.report.readers.runs import read_run
from lightning_gradguard.runtime.incidents.journal import MAX_PRINTED
from lightning_gradguard.runtime.incidents.table import incident_table
from tests.tasks import Batch, Classifier, batches, clusters, fit, plain_loader, poisoned


def kinds(folder: Path, *, nan_at: int, rollback: NaNRollback, **arguments: Any) -> list[str]:
    """Trains with a finding at step 100 and a NaN batch; returns the kinds of incidents in the file."""
    data = poisoned(clusters(130), nan=[nan_at])
    fit(
        Classifier(),
        data,
        [AdaptiveGradientClipping(GlobalNormClipping(1e-4)), rollback],
        folder,
        **arguments,
    )
    files = [*folder.rglob("incidents.jsonl")]
    return [json.loads(line)["kind"] for file in files for line in file.read_text().splitlines()]


def test_without_a_logger_findings_are_written_with_an_intervention(tmp_path: Path) -> None:
    assert kinds(tmp_path / "after", nan_at=120, rollback=NaNRollback()) == [
        "constant_clipping",
        "nonfinite_loss",
    ]
    assert kinds(tmp_path / "before", nan_at=50, rollback=NaNRollback()) == [
        "nonfinite_loss",
        "constant_clipping",
    ]
    assert kinds(tmp_path / "never", nan_at=200, rollback=NaNRollback()) == []
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("asks", ["logger", "incident_dir"])
def test_findings_are_written_where_files_are_asked_for(asks: str, tmp_path: Path) -> None:
    rollback = NaNRollback(incident_dir=str(tmp_path) if asks == "incident_dir" else None)
    logger = CSVLogger(tmp_path) if asks == "logger" else False
    assert kinds(tmp_path, nan_at=200, rollback=rollback, logger=logger) == ["constant_clipping"]


def test_incidents_that_were_not_examined_are_last_in_the_table_and_without_details(tmp_path: Path) -> None:
    data = poisoned(batches(12), nan=[1, 4, 7, 8, 11])
    fit(Classifier(), data, [NaNRollback(max_dossiers=2)], tmp_path)
    incidents = [*read_incidents(tmp_path / "incidents.jsonl", [])]
    lines = incident_table([*reversed(incidents)], {"nonfinite_loss": 5}).splitlines()
    rows = [line for line in lines if line.startswith(("| ", "* "))][1:]
    assert [row.split()[1] for row in rows] == ["1", "7", "Step", "Step"]
    assert "2 times" in rows[0]
    assert "3 times" in rows[1]
    assert "not examined" in rows[1]
    assert not any("Not examined" in row for row in rows)


def test_message_of_a_batch_beyond_max_dossiers_says_so_and_gives_no_advice_on_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rollback = NaNRollback(max_dossiers=1)
    trainer = fit(Classifier(), poisoned(batches(12), nan=[1, 5, 6]), [rollback], tmp_path)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    printed = [line for line in capsys.readouterr().err.splitlines() if "Not examined" in line]
    (message,) = printed
    assert "skipped. Not examined: NaNRollback(max_dossiers=1) is used up; raise it to have more" in message
    assert "The last one (step 1): cause: bad input, at batch[0]" in message
    assert "float32" not in message
    again, path = NaNRollback(max_dossiers=1), str(tmp_path / "run.ckpt")
    data = poisoned(batches(12), nan=[3])
    fit(Classifier(), data, [again], tmp_path / "2", ckpt_path=path, max_epochs=2)
    assert "The last one (step 1): cause: bad input" in capsys.readouterr().err


class Duplicates(Classifier):
    """The gradient of a distance of 0 is NaN, in two rows of two batches of three."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        is_far = torch.ones(len(batch[0]), 1)
        is_far[2:4] = batch_idx % 3 == 0
        distance: Tensor = (self.net(batch[0]) * is_far).pow(2).sum(1).sqrt()
        return loss + distance.mean()


def test_skips_of_one_line_are_told_in_one_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows are on the line, steps that were not examined name no other place, and the end is said once."""
    fit(Duplicates(), batches(24), [NaNRollback(max_skip_fraction=1.0)], tmp_path)
    output = capsys.readouterr().err
    printed = [line for line in output.splitlines() if "at step" in line]
    examined = [line for line in printed if "Not examined" not in line]
    assert len(examined) == 5
    assert all(
        "test_journal.py:" in line and "; row 2, 3; 100% of the gradients" in line for line in examined
    )
    assert (
        ".pow(2).sum(1).sqrt() use torch.sqrt((self.net(batch[0]) * is_far).pow(2).sum(1) + 1e-6)."
        in examined[0]
    )
    (other,) = set(printed) - set(examined)
    assert "(epoch 0, batch 2): 100% of the gradients; skipped. Not examined: it follows" in other
    assert "Further incidents of nonfinite gradients are only written to the file." in printed[-1]
    assert "16 of 24 (66.7%)" in output


class Service(Logger):
    """Keeps metrics elsewhere, such as W&B, and names its runs."""

    name, version, save_dir = "project", "run-7", "service"

    def log_metrics(self, *_: Any, **__: Any) -> None: ...

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def test_incidents_are_beside_metrics_whatever_logger_is_first(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callbacks = [GradientNormMonitor(), NaNRollback()]
    fit(Classifier(), poisoned(batches(12), nan=[4]), callbacks, tmp_path, logger=[Service(), logger])
    assert {"incidents.jsonl", "metrics.csv"} <= {file.name for file in Path(logger.log_dir).iterdir()}
    assert [*tmp_path.rglob("incidents.jsonl")] == [Path(logger.log_dir) / "incidents.jsonl"]


@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # metrics.csv is deleted
@pytest.mark.parametrize("logger", [CSVLogger, TensorBoardLogger])
def test_records_are_those_of_the_run_that_began_last_and_of_one_that_resumes_it(
    logger: type[CSVLogger | TensorBoardLogger], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    data = poisoned(batches(12), nan=[4])

    def train(**more: Any) -> tuple[int, int, int]:
        own = logger(tmp_path, name="", version="run")
        trainer = fit(Classifier(), data, [NaNRollback()], folder, logger=own, log_every_n_steps=1, **more)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        run = read_run("run", folder)
        return len(run.log.incidents), sum(run.lost_batches.values()), len(run.dossiers)

    assert train() == train() == (1, 1, 1)
    assert (folder / "incidents.jsonl.1").exists()
    resumed = train(max_epochs=2, ckpt_path=str(tmp_path / "last.ckpt"))
    assert resumed[:2] == (2, 2)


def test_second_fit_prints_and_counts_from_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, data = Classifier(), poisoned(batches(20), nan=range(0, 14, 2))
    trainer = fit(module, data, [NaNRollback(max_dossiers=100)], tmp_path)
    first = capsys.readouterr().err
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, plain_loader(data))
    second = capsys.readouterr().err
    assert (
        first.count("gradguard: Nonfinite loss") == second.count("gradguard: Nonfinite loss") == MAX_PRINTED
    )
    assert "nonfinite loss (7)" in first
    assert "nonfinite loss (7)" in second
    assert len((tmp_path / "incidents.jsonl").read_text().splitlines()) == 14
