"""Reads a run from its folder."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from lightning_gradguard.core.tags import Meaning, Role, meaning_of
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog, Series
from lightning_gradguard.report.readers.incident_files import (
    DossierEntry,
    read_dossiers,
    read_incidents,
    read_lost_batches,
    without_abandoned,
)
from lightning_gradguard.report.readers.run_folders import INCIDENTS, scalar_files, scalars_in
from lightning_gradguard.report.readers.series import to_series


@dataclass(frozen=True)
class Run:
    """A run as read from its folder.

    Args:
        name: Unique among the runs of the report.
        path: Its folder.
        log: Its values and incidents.
        rates: Learning rates used by the optimizers, by parameter group.
        loss_tag: Tag used as the training loss; empty if there is none.
        lost_batches: Number of lost batches by reason.
        ranks: Number of ranks with lost batches.
        dossiers: By step.
        hparams: Hyperparameters as text.
        notes: On damaged or missing files.
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


def read_run(name: str, path: Path) -> Run:
    """Reads a run.

    Args:
        name: Of the run.
        path: Its folder.
    """
    notes: list[str] = []
    series, abandoned = to_series(scalars_in(path, notes), lambda tag: meaning_of(tag) is not None)
    if abandoned:
        notes.append(
            f"steps from {abandoned.first} on were logged again, as after a resume; the later values are used"
        )
    if not scalar_files(path):
        notes.append("there is neither an event file nor a metrics.csv, only incidents.jsonl")
    incidents = list(read_incidents(path / INCIDENTS, notes))
    tags = _SeriesByRole(series)
    loss_tag = tags.loss_tag()
    log = RunLog(
        loss=series.get(loss_tag, Series()),
        gradients=tuple(map(tags.gradient_log, tags.optimizers())),
        skips=tags.one("skips"),
        rollbacks=tags.one("rollbacks"),
        backoff_scale=tags.one("scale"),
        incidents=tuple(without_abandoned(incidents, abandoned) if abandoned else incidents),
        largest_norm=max((v for s in tags.every("largest").values() for _, v in s.finite()), default=None),
    )
    lost_batches, ranks = read_lost_batches(path, notes)
    return Run(
        name=name,
        path=path,
        log=log,
        rates=tags.every("rate"),
        loss_tag=loss_tag,
        lost_batches=lost_batches,
        ranks=ranks,
        dossiers=tuple(read_dossiers(path / "incidents")),
        hparams=_read_hparams(path / "hparams.yaml", notes),
        notes=tuple(notes),
    )


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
