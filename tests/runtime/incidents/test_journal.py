"""The file of incidents: which runs write one, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.loggers import CSVLogger

from lightning_gradguard import AdaptiveGradientClipping, GlobalNormClipping, NaNRollback
from tests.tasks import Classifier, clusters, fit, poisoned


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
