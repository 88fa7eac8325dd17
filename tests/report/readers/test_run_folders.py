"""Runs are found in nested folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_gradguard.report.readers.runs import find_runs
from tests.report.runs import write_events


def test_stray_file_does_not_hide_the_runs_below_it() -> None:
    write_events("top", {"hp_metric": [-1.0]})
    for name in ("version_0", "version_1"):
        write_events(f"top/{name}", {"train_loss": [1.0] * 5})
    assert list(find_runs([Path("top")])) == ["version_0", "version_1"]
    # a run of its own is one
    write_events("top", {"train_loss": [1.0]}, first_step=1)
    assert list(find_runs([Path("top")])) == ["top"]


def test_a_folder_without_permission_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("top/run", "top/secret"):
        write_events(name, {"train_loss": [1.0] * 5})
    # not by the mode of the folder: tests may run as root
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "secret")
    assert [*find_runs([Path("top")]).values()] == [Path("top/run")]
    with pytest.raises(FileNotFoundError, match="top/secret cannot be read: this user has no permission"):
        find_runs([Path("top/secret")])


def test_runs_without_a_logger_in_one_folder_are_two() -> None:
    for folder in ("top", "top/version_1"):
        Path(folder).mkdir()
        Path(folder, "incidents.jsonl").write_text("{}\n")
    assert [*find_runs([Path("top")]).values()] == [Path("top"), Path("top/version_1")]


def test_runs_are_in_natural_order_with_unique_names() -> None:
    write_events("runs/version_10", {"train_loss": [1.0]})
    write_events("runs/version_9", {"train_loss": [1.0]})
    write_events("runs/deep/er/run", {"train_loss": [1.0]})
    assert list(find_runs([Path("runs")])) == ["deep/er/run", "version_9", "version_10"]
    assert list(find_runs([Path("runs/version_9"), Path("runs/version_10")])) == ["version_9", "version_10"]
    write_events("other/version_9", {"train_loss": [1.0]})
    names = list(find_runs([Path("runs/version_9"), Path("other/version_9")]))
    assert names == ["runs", "other"]
