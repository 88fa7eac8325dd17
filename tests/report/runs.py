"""Creates runs to report on."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard.cli import report
from lightning_gradguard.report.readers.runs import read_run
from lightning_gradguard.report.run_report import RunReport, report_on
from tests.tasks import Batch, fit

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "lightning_gradguard/report/schema.json").read_text())


def train(
    module: pl.LightningModule, data: Sequence[Batch], callbacks: Sequence[pl.Callback], **more: Any
) -> Path:
    """Trains a module and logs to the folder `run`."""
    logger = TensorBoardLogger(".", name="", version="run", default_hp_metric=False)
    fit(module, data, callbacks, logger=logger, **{"log_every_n_steps": 1, **more})
    return Path("run")


def report_of(path: Path | str, name: str = "run") -> RunReport:
    return report_on(read_run(name, Path(path)))


def write_events(folder: str, scalars: Mapping[str, Sequence[float]], first_step: int = 0) -> Path:
    """Writes scalars by TensorBoard's own writer; each call creates a file."""
    with SummaryWriter(folder, filename_suffix=f".{first_step}") as writer:
        for tag, values in scalars.items():
            for step, value in enumerate(values, first_step):
                writer.add_scalar(tag, value, step)
    return Path(folder)


def write_table(folder: str, columns: Mapping[str, Sequence[float]]) -> Path:
    """Writes scalars in the format of CSVLogger: blank at steps without a value."""
    Path(folder).mkdir(parents=True)
    longest = max(map(len, columns.values()))
    with Path(folder, "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", *columns])
        for step in range(longest):
            values = [v[step] if step < len(v) else "" for v in columns.values()]
            writer.writerow([0, step, *values])
            writer.writerow([0, step, *[""] * len(columns)])
    return Path(folder)


def write_long(folder: str, tags: Sequence[str], n: int) -> Path:
    """Writes many points without the writer, which would take longer than all other tests together."""
    Path(folder).mkdir()
    with Path(folder, "events.out.tfevents.1").open("wb") as file:
        for step in range(n):
            values = [Summary.Value(tag=tag, simple_value=1 / (1 + step)) for tag in tags]
            record = Event(step=step, summary=Summary(value=values)).SerializeToString()
            file.write(struct.pack("<QI", len(record), 0) + record + b"\0\0\0\0")
    return Path(folder)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    report.main(arguments)
    return capsys.readouterr().out
