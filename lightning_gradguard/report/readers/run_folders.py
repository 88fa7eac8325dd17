"""Folders of runs: the search for them, and the files with scalars in each."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from lightning_gradguard.core.tags import meaning_of
from lightning_gradguard.report.readers import csv_logger, tensorboard
from lightning_gradguard.report.readers.series import LoggedScalar

#: File with the incidents of a run, in its folder.
INCIDENTS = "incidents.jsonl"


def find_runs(paths: Iterable[Path]) -> dict[str, Path]:
    """Finds the folders of runs; returns them by a unique name for each.

    Args:
        paths: Folders of runs, and folders that contain such folders at any depth.

    Raises:
        FileNotFoundError: If one is not a folder, or contains no run.
    """
    found: list[tuple[str, Path]] = []
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(_not_a_folder(path))
        runs = sorted(_runs_in(path), key=natural_order)
        if not runs:
            raise FileNotFoundError(_without_runs(path))
        found += [(path.resolve().name if run == path else str(run.relative_to(path)), run) for run in runs]
    times = Counter(name for name, _ in found)
    return {name if times[name] == 1 else str(path): path for name, path in found}


def scalar_files(path: Path) -> list[Path]:
    """Returns the files with scalars, oldest first; event files are preferred to a metrics.csv."""
    events = sorted(file for file in path.iterdir() if "tfevents" in file.name and file.is_file())
    table = path / csv_logger.NAME
    return events or ([table] if table.is_file() else [])


def scalars_in(path: Path, notes: list[str]) -> Iterator[LoggedScalar]:
    """Yields the scalars of a run.

    Args:
        path: Its folder.
        notes: Receives what readers should know about damaged files.
    """
    for file in scalar_files(path):
        read = csv_logger.scalars_in if file.name == csv_logger.NAME else tensorboard.scalars_in
        yield from read(file, notes)


def natural_order(path: Path) -> list[tuple[str, int]]:
    """Sort key that puts `version_10` behind `version_9`."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def _is_run(path: Path) -> bool:
    return bool(scalar_files(path)) or (path / INCIDENTS).is_file()


def _has_content(path: Path) -> bool:
    """True if there is more than a stray file of hyperparameters, as beside the runs of a search."""
    if (path / INCIDENTS).is_file():
        return True
    return any(meaning_of(tag) is not None for _, tag, _ in scalars_in(path, []))


def _runs_in(path: Path) -> list[Path]:
    """Returns the folder itself if it is a run, else the runs below it."""
    is_run = _is_run(path)
    if is_run and _has_content(path):
        return [path]
    below = [
        run
        for folder in path.iterdir()
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith(".")
        for run in _runs_in(folder)
    ]
    return below or ([path] if is_run else [])


def _not_a_folder(path: Path) -> str:
    if path.exists():
        return f"{path} is a file; name the folder that it is in: {path.parent}"
    parent = path.parent
    known = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    before = "" if parent == Path() else f"{parent}{os.sep}"
    near = difflib.get_close_matches(path.name, known, n=1)
    return f"there is no folder {path}." + (f" Did you mean {before}{near[0]}?" if near else "")


def _without_runs(path: Path) -> str:
    nearby = sorted(run for run in path.resolve().parent.iterdir() if run.is_dir() and _is_run(run))[:5]
    hint = f" There are runs nearby: {', '.join(os.path.relpath(run) for run in nearby)}." if nearby else ""
    return f"there is neither an event file nor a metrics.csv in {path}, nor in a folder below it.{hint}"
