"""Finds the folders of runs, and reads a run from its folder."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_gradguard.core.arguments import nearest
from lightning_gradguard.core.tags import Meaning, Role, meaning_of
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog, Series
from lightning_gradguard.report.readers.incident_files import (
    DossierEntry,
    folder_of_incidents,
    natural_order,
    read_dossiers,
    read_incidents,
    read_lost_batches,
    without_abandoned,
)
from lightning_gradguard.report.readers.scalars import read_scalars, scalar_files, to_series

#: File with the incidents of a run, in its folder.
INCIDENTS = "incidents.jsonl"


@dataclass(frozen=True)
class Run:
    """A run as read from its folder.

    `rates` are the learning rates used by the optimizers, by parameter group; `loss_tag` is empty if there is
    none; `lost_batches` counts them by reason, over the `ranks` that have any.
    """

    name: str
    path: Path
    log: RunLog
    rates: Mapping[str, Series]
    loss_tag: str
    lost_batches: Mapping[str, int]
    ranks: int
    dossiers: Sequence[DossierEntry]
    hparams: Mapping[str, str]
    notes: tuple[str, ...]


def find_runs(paths: Iterable[Path]) -> dict[str, Path]:
    """Finds the runs in folders, at any depth, and returns their folders by unique names.

    Raises:
        FileNotFoundError: If a path is not a folder, or contains no run.
    """
    found: list[tuple[str, Path]] = []
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(_not_a_folder(path))
        if not _is_readable(path):
            raise FileNotFoundError(f"{path} cannot be read: this user has no permission.")
        runs = sorted(_runs_in(path), key=natural_order)
        if not runs:
            raise FileNotFoundError(_without_runs(path))
        found += [(path.resolve().name if run == path else str(run.relative_to(path)), run) for run in runs]
    # the folder of a second logger is of the same run
    folders = {run.resolve() for _, run in found}
    found = [
        (name, run)
        for name, run in found
        if (there := folder_of_incidents(run).resolve()) == run.resolve() or there not in folders
    ]
    if len(found) == 1:
        return dict(found)
    runs = list(dict.fromkeys(run for _, run in found))
    return dict(zip(_differing_parts(runs), runs, strict=True))


def _differing_parts(paths: Sequence[Path]) -> list[str]:
    """Returns paths without what all begin with, and without what all end with.

    Example:
        >>> _differing_parts([Path("logs/bare/version_0"), Path("logs/guarded/version_0")])
        ['bare', 'guarded']
    """
    parts = [path.resolve().parts for path in paths]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest - 1)
    most = shortest - start - 1
    end = next((i for i in range(most) if len({p[-1 - i] for p in parts}) > 1), most)
    return [os.path.join(*p[start : len(p) - end]) for p in parts]


def read_run(name: str, path: Path) -> Run:
    """Reads the run in a folder."""
    notes: list[str] = []
    series, abandoned = to_series(read_scalars(path, notes), lambda tag: meaning_of(tag) is not None)
    if abandoned:
        notes.append(
            f"steps from {abandoned.first} on were logged again, as after a resume; the later values are used"
        )
    there = folder_of_incidents(path)
    if not scalar_files(path):
        notes.append("there is neither an event file nor a metrics.csv, only incidents.jsonl")
    incidents = list(read_incidents(there / INCIDENTS, notes))
    tags = _SeriesByRole(series)
    loss_tag = tags.loss_tag()
    log = RunLog(
        loss=series.get(loss_tag, Series()),
        gradients=tuple(map(tags.gradient_log, tags.optimizers())),
        skips=tags.one("skips"),
        rollbacks=tags.one("rollbacks"),
        backoff_scale=tags.one("scale"),
        incidents=tuple(without_abandoned(incidents, abandoned) if abandoned else incidents),
        was_checked=bool(tags.every("initialization")),
        largest_norm=max((v for s in tags.every("largest").values() for _, v in s.finite()), default=None),
        clipped_fraction=next(reversed(tags.one("run_fraction").values), None),
        clip_coefficient=next(reversed(tags.one("run_coefficient").values), None),
        over_constant=next(reversed(tags.one("run_over_constant").values), None),
    )
    lost_batches, ranks = read_lost_batches(there, notes)
    return Run(
        name=name,
        path=path,
        log=log,
        rates=tags.every("rate"),
        loss_tag=loss_tag,
        lost_batches=lost_batches,
        ranks=ranks,
        dossiers=tuple(read_dossiers(there, path, log.incidents)),
        hparams=_read_hparams(path / "hparams.yaml", notes),
        notes=tuple(notes),
    )


def _is_readable(folder: Path) -> bool:
    return os.access(folder, os.R_OK | os.X_OK)


def _is_run(path: Path) -> bool:
    return bool(scalar_files(path)) or (path / INCIDENTS).is_file()


def _has_content(path: Path) -> bool:
    """True if there is more than a stray file of hyperparameters, as beside the runs of a search."""
    if (path / INCIDENTS).is_file():
        return True
    return any(meaning_of(tag) is not None for _, tag, _ in read_scalars(path, []))


def _runs_in(path: Path) -> list[Path]:
    """Returns the folder itself if it is a run, with later ones in it, else the runs below it."""
    is_run = _is_run(path)
    if is_run and _has_content(path):  # without a logger, the next run in it has a folder of its own
        later = [] if scalar_files(path) else [run for run in path.glob("version_*") if _is_run(run)]
        return [path, *later]
    below = [
        run
        for folder in path.iterdir()
        if folder.is_dir() and not folder.is_symlink() and not folder.name.startswith(".")
        if _is_readable(folder)
        for run in _runs_in(folder)
    ]
    return below or ([path] if is_run else [])


def _not_a_folder(path: Path) -> str:
    if path.exists():
        return f"{path} is a file; name the folder that it is in: {path.parent}"
    parent = path.parent
    known = [child.name for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []
    before = "" if parent == Path() else f"{parent}{os.sep}"
    return f"there is no folder {path}.{nearest(path.name, known, before)}"


def _without_runs(path: Path) -> str:
    nearby = sorted(run for run in path.resolve().parent.iterdir() if run.is_dir() and _is_run(run))[:5]
    hint = f" There are runs nearby: {', '.join(os.path.relpath(run) for run in nearby)}." if nearby else ""
    return f"there is neither an event file nor a metrics.csv in {path}, nor in a folder below it.{hint}"


class _SeriesByRole:
    """Selects series by the role of their tags; of competing tags the one with the lowest rank."""

    def __init__(self, series: Mapping[str, Series]) -> None:
        self._series = series
        self._by_role: dict[Role, list[tuple[str, Meaning]]] = defaultdict(list)
        for tag in series:
            meaning = meaning_of(tag)
            assert meaning is not None
            self._by_role[meaning.role].append((tag, meaning))

    def optimizers(self) -> list[int]:
        return sorted({m.optimizer for role in ("total", "layer") for _, m in self._by_role[role]})

    def loss_tag(self) -> str:
        losses = self._by_role["loss"]
        tag, _ = min(
            losses, key=lambda found: (found[1].rank, -len(self._series[found[0]])), default=("", None)
        )
        return tag

    def every(self, role: Role) -> dict[str, Series]:
        return {meaning.name: self._series[tag] for tag, meaning in self._by_role[role]}

    def one(self, role: Role, optimizer: int = 0) -> Series:
        tags = [
            (m.rank, -len(self._series[t]), t) for t, m in self._by_role[role] if m.optimizer == optimizer
        ]
        return self._series[min(tags)[2]] if tags else Series()

    def by_name(self, role: Role, optimizer: int) -> dict[str, Series]:
        members = [(m, self._series[t]) for t, m in self._by_role[role] if m.optimizer == optimizer]
        lowest = min((m.rank for m, _ in members), default=0)
        return {m.name: series for m, series in members if m.rank == lowest}

    def gradient_log(self, optimizer: int) -> GradientLog:
        layers = self.by_name("layer", optimizer)
        total = self.one("total", optimizer)
        return GradientLog(
            optimizer=optimizer,
            total=total if len(total) else _total_norm(layers.values()),
            layers=layers,
            weights=self.by_name("weight", optimizer),
            ratios=self.by_name("ratio", optimizer),
            clipped=self.one("clipped", optimizer),
            clip_fraction=self.one("fraction", optimizer),
            clip_coefficient=self.one("coefficient", optimizer),
            clip_threshold=self.one("threshold", optimizer),
            nonfinite_fraction=self.one("nonfinite_fraction", optimizer),
        )


def _total_norm(layers: Iterable[Series]) -> Series:
    """Returns the total norm where only norms of layers were logged."""
    squares: dict[int, float] = defaultdict(float)
    for series in layers:
        for step, value in zip(series.steps, series.values, strict=True):
            squares[step] += value * value
    steps = sorted(squares)
    return Series(steps, [math.sqrt(squares[step]) for step in steps])


def _read_hparams(path: Path, notes: list[str]) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (yaml.YAMLError, OSError, ValueError):
        notes.append(f"{path.name} contains more than plain values and is not shown")
        return {}
    return {str(key): str(value) for key, value in content.items()} if isinstance(content, dict) else {}
