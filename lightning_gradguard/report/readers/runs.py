"""What a training run left in its folder: finding the runs, and reading them."""

from __future__ import annotations

import difflib
import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_gradguard.core.incidents import current_name
from lightning_gradguard.core.tags import Meaning, Role, meaning_of
from lightning_gradguard.report.analysis.outcome import LATE
from lightning_gradguard.report.analysis.run_log import GradientLog, RecordedIncident, RunLog, Series
from lightning_gradguard.report.readers import csv_logger, tensorboard
from lightning_gradguard.report.readers.series import Abandoned, Scalar, series_of


@dataclass(frozen=True)
class Dossier:
    """What a dossier says; see `runtime.incidents.dossier` for all that is in it."""

    step: int
    cause: str
    detail: str
    path: str


@dataclass(frozen=True)
class Run:
    """A run, as it was found.

    Args:
        name: What it is called among those of the report.
        path: Its folder.
        log: What it logged.
        rates: Learning rates that optimizers used, by parameter group.
        loss_tag: The tag that was taken for the training loss; empty if there is none.
        lost_batches: How many were lost, by reason.
        ranks: How many ranks have lost some.
        dossiers: Of its incidents, by step.
        hparams: Hyperparameters, as text.
        notes: What a person should know of the reading.
    """

    name: str
    path: Path
    log: RunLog
    rates: Mapping[str, Series]
    loss_tag: str
    lost_batches: Mapping[str, int]
    ranks: int
    dossiers: Sequence[Dossier]
    hparams: Mapping[str, str]
    notes: tuple[str, ...]


def find_runs(paths: Iterable[Path]) -> dict[str, Path]:
    """Folders of runs, by the names that tell them apart.

    Args:
        paths: Folders of runs, and folders that hold such folders, however deep.

    Raises:
        FileNotFoundError: If one is no folder, or there is no run in it.
    """
    found: list[tuple[str, Path]] = []
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(_no_folder(path))
        runs = sorted(_runs_in(path), key=_natural)
        if not runs:
            raise FileNotFoundError(_no_run(path))
        found += [(path.resolve().name if run == path else str(run.relative_to(path)), run) for run in runs]
    times = Counter(name for name, _ in found)
    return {name if times[name] == 1 else str(path): path for name, path in found}


def read_run(name: str, path: Path) -> Run:
    """Read what a run left.

    Args:
        name: What it is called.
        path: Its folder.
    """
    notes: list[str] = []
    series, abandoned = series_of(_scalars(path, notes), lambda tag: meaning_of(tag) is not None)
    if abandoned:
        notes.append(
            f"steps from {abandoned.first} on were logged again, as after a resume; the last ones count"
        )
    if not _logs(path):
        notes.append("there is neither an event file nor a metrics.csv, only incidents.jsonl")
    incidents = list(_incidents(path / "incidents.jsonl", notes))
    by_role: dict[Role, list[tuple[str, Meaning]]] = defaultdict(list)
    for tag in series:
        meaning = meaning_of(tag)
        assert meaning is not None
        by_role[meaning.role].append((tag, meaning))
    loss_tag = min(
        by_role["loss"], key=lambda found: (found[1].rank, -len(series[found[0]])), default=("", None)
    )[0]
    indices = sorted({m.optimizer for role in ("total", "layer") for _, m in by_role[role]})

    def only(role: Role, index: int = 0) -> Series:
        found = [(m.rank, -len(series[tag]), tag) for tag, m in by_role[role] if m.optimizer == index]
        return series[min(found)[2]] if found else Series()

    def named(role: Role, index: int) -> dict[str, Series]:
        members = [(m, series[tag]) for tag, m in by_role[role] if m.optimizer == index]
        least = min((m.rank for m, _ in members), default=0)
        return {m.name: s for m, s in members if m.rank == least}

    def gradients(index: int) -> GradientLog:
        layers = named("layer", index)
        total = only("total", index)
        if not len(total):
            total = _together(layers.values())
        return GradientLog(
            optimizer=index,
            total=total,
            layers=layers,
            weights=named("weight", index),
            ratios=named("ratio", index),
            clipped=only("clipped", index),
            clip_fraction=only("fraction", index),
            clip_coefficient=only("coefficient", index),
            clip_threshold=only("threshold", index),
            nonfinite_fraction=only("nonfinite_fraction", index),
        )

    log = RunLog(
        loss=series.get(loss_tag, Series()),
        gradients=tuple(gradients(index) for index in indices),
        skips=only("skips"),
        rollbacks=only("rollbacks"),
        backoff_scale=only("scale"),
        incidents=tuple(_that_went_on(incidents, abandoned) if abandoned else incidents),
        largest_norm=max((v for tag, _ in by_role["largest"] for _, v in series[tag].finite()), default=None),
    )
    return Run(
        name=name,
        path=path,
        log=log,
        rates={m.name: series[tag] for tag, m in by_role["rate"]},
        loss_tag=loss_tag,
        lost_batches=_lost_batches(path, notes),
        ranks=len(_ledgers(path)),
        dossiers=tuple(_dossiers(path / "incidents")),
        hparams=_hparams(path / "hparams.yaml", notes),
        notes=tuple(notes),
    )


def _logs(path: Path) -> list[Path]:
    """The files with scalars, in the order in which they were begun; of a run that has both, event files."""
    events = sorted(file for file in path.iterdir() if "tfevents" in file.name and file.is_file())
    table = path / csv_logger.NAME
    return events or ([table] if table.is_file() else [])


def _scalars(path: Path, notes: list[str]) -> Iterator[Scalar]:
    for file in _logs(path):
        read = csv_logger.scalars_in if file.name == csv_logger.NAME else tensorboard.scalars_in
        yield from read(file, notes)


def _is_run(path: Path) -> bool:
    return bool(_logs(path)) or (path / "incidents.jsonl").is_file()


def _says_something(path: Path) -> bool:
    """Whether there is more than a stray file with hyperparameters, as beside the runs of a search."""
    if (path / "incidents.jsonl").is_file():
        return True
    return any(meaning_of(tag) is not None for _, tag, _ in _scalars(path, []))


def _runs_in(path: Path) -> list[Path]:
    """The folder itself, if it is a run; else those below it, however deep."""
    is_run = _is_run(path)
    if is_run and _says_something(path):
        return [path]
    below = [
        run
        for folder in path.iterdir()
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith(".")
        for run in _runs_in(folder)
    ]
    return below or ([path] if is_run else [])


def _natural(path: Path) -> list[tuple[str, int]]:
    """Puts `version_10` behind `version_9`."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", str(path))]


def _no_folder(path: Path) -> str:
    if path.exists():
        return f"{path} is a file; name the folder that it is in: {path.parent}"
    parent = path.parent
    known = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    before = "" if parent == Path() else f"{parent}{os.sep}"
    near = difflib.get_close_matches(path.name, known, n=1)
    return f"there is no folder {path}." + (f" Did you mean {before}{near[0]}?" if near else "")


def _no_run(path: Path) -> str:
    nearby = sorted(run for run in path.resolve().parent.iterdir() if run.is_dir() and _is_run(run))[:5]
    hint = f" There are runs nearby: {', '.join(os.path.relpath(run) for run in nearby)}." if nearby else ""
    return f"there is neither an event file nor a metrics.csv in {path}, nor in a folder below it.{hint}"


def _together(layers: Iterable[Series]) -> Series:
    """The norm of all gradients, where only those of layers were logged."""
    squares: dict[int, float] = defaultdict(float)
    for series in layers:
        for step, value in zip(series.steps, series.values, strict=True):
            squares[step] += value * value
    steps = sorted(squares)
    return Series(steps, [math.sqrt(squares[step]) for step in steps])


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a file that are JSON objects."""
    broken = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            yield record
        else:
            broken += bool(line.strip())
    if broken:
        notes.append(f"{broken} {'lines' if broken > 1 else 'line'} of {path.name} could not be read")


def _incidents(path: Path, notes: list[str]) -> Iterator[RecordedIncident]:
    if not path.is_file():
        return
    left_out = 0
    for record in _records(path, notes):
        value = record.get("value")
        try:
            yield RecordedIncident(
                kind=str(record["kind"]),
                step=int(record["step"]),
                where=tuple(map(str, record.get("where") or ())),
                value=None if value is None else float(value),
                **{key: str(record.get(key) or "") for key in ("advice", "detail", "dossier")},
                action=current_name(str(record.get("action") or "none")),
                cause=current_name(str(record.get("cause") or "")),
            )
        except (KeyError, TypeError, ValueError, OverflowError):
            left_out += 1
    if left_out:
        notes.append(f"{left_out} records of {path.name} are no incidents")


def _that_went_on(incidents: Sequence[RecordedIncident], abandoned: Abandoned) -> Iterator[RecordedIncident]:
    """Without those of steps that a resumed run has made again, unless it is that run which tells of them.

    Incidents bear no time, but they stand in the order in which they happened: the resumed run begins where
    steps go back, or where an incident is told a second time.
    """
    seen: set[tuple[str, int]] = set()
    resumed = len(incidents)
    for i, incident in enumerate(incidents):
        # one that is judged late may stand behind one of the next step
        goes_back = i > 0 and incident.step < incidents[i - 1].step - LATE
        if goes_back or (incident.kind, incident.step) in seen:
            resumed = i
            break
        seen.add((incident.kind, incident.step))
    for i, incident in enumerate(incidents):
        if i >= resumed or not abandoned.first <= incident.step <= abandoned.last + LATE:
            yield incident


def _lost_batches(path: Path, notes: list[str]) -> Counter[str]:
    return Counter(
        str(record.get("reason", "lost")) for file in _ledgers(path) for record in _records(file, notes)
    )


def _ledgers(path: Path) -> list[Path]:
    return sorted(path.glob("lost_batches.rank*.jsonl"))


def _dossiers(folder: Path) -> Iterator[Dossier]:
    findings = sorted(folder.glob("*/finding.json"), key=_natural)
    for file in findings:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            page = os.path.join(folder.name, file.parent.name, "index.html")
            yield Dossier(int(found["step"]), current_name(str(found["cause"])), str(found["detail"]), page)
        except (OSError, KeyError, TypeError, ValueError):
            continue  # a dossier that is torn or of another version is not told of


def _hparams(path: Path, notes: list[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (yaml.YAMLError, OSError, ValueError):
        notes.append(f"{path.name} holds more than plain values, and is not shown")
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}
