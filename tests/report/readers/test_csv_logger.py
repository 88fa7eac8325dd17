"""The metrics.csv of CSVLogger is read like event files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lightning_gradguard import NaNRollback, default_callbacks
from lightning_gradguard.report.readers.runs import find_runs
from lightning_gradguard.report.render.json import to_json
from tests.report.runs import report_of, write_events, write_table
from tests.tasks import Classifier, clusters, fit, poisoned

NAN = math.nan


def test_table_and_event_file_give_the_same_report() -> None:
    norms = [1.0, 1.25, 512.0, 2.0**24, NAN]
    tags = {"grad_norm/total": norms, "grad_norm/a.weight": norms, "train_loss": [4.0, 3.5, 4.5, 90.0, NAN]}
    from_table, from_events = (
        json.loads(to_json([report_of(make(name, tags), "run")]))["runs"][0]
        for make, name in ((write_table, "table"), (write_events, "events"))
    )
    assert from_table.pop("path") != from_events.pop("path")
    assert from_table == from_events
    assert from_table["headline"] == "exploding gradients"


def test_run_of_a_csv_logger() -> None:
    logger = CSVLogger(".", name="", version="run")
    fit(
        Classifier(),
        poisoned(clusters(40), nan=[30]),
        default_callbacks(),
        logger=logger,
        log_every_n_steps=1,
    )
    found = report_of("run")
    assert (found.verdict.headline, found.verdict.outcome.steps) == (
        "recovered from nonfinite loss (cause: bad input)",
        40,
    )
    assert found.interventions.skips == 1
    assert list(find_runs([Path()])) == ["run"]


def test_folder_of_a_second_logger_is_of_the_same_run() -> None:
    """Incidents, dossiers and lost batches are in the folder of the first."""
    loggers = [TensorBoardLogger(".", "", "board"), CSVLogger(".", "", "table")]
    data = poisoned(clusters(40), nan=[30])
    fit(Classifier(), data, default_callbacks(), logger=loggers, log_every_n_steps=1)
    board, table = (json.loads(to_json([report_of(name, "run")]))["runs"][0] for name in ("board", "table"))
    for part in ("headline", "symptoms", "incidents", "interventions", "next_steps", "timeline"):
        assert board[part] == table[part], part
    pages = [Path(run["path"], run["dossiers"][0]["path"]) for run in (board, table)]
    assert pages[0].samefile(pages[1])
    assert [*find_runs([Path()])] == ["board"]
    assert [*find_runs([Path("table")])] == ["table"]
    fit(Classifier(), poisoned(clusters(4), nan=[2]), [NaNRollback()], logger=loggers[1])
    assert report_of("table").run.log.incidents[-1].step == 2


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a,b\n1,2\n", "has no column named step"),
        ("", "has no column named step"),
        ("step,train_loss\nx,1\n1.5,1\n,1\n3\n4,odd\n5,1,7\n", ""),
    ],
)
def test_malformed_tables(text: str, note: str) -> None:
    Path("run").mkdir()
    Path("run/metrics.csv").write_text(text)
    found = report_of("run")
    assert any(note in line for line in found.notes)
    assert list(found.run.log.loss.steps) == ([] if note else [5])
