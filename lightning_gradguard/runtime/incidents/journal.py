"""Publishes incidents: to the file, the loggers, the console, callbacks and the module."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections import Counter, deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl

from lightning_gradguard.core.incidents import Incident, first_names, label
from lightning_gradguard.runtime.distributed import gather_objects
from lightning_gradguard.runtime.lightning_api import batches_that_stepped
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.logging import console, markdown, metrics

#: How often one kind of incident is said on the console before only the file goes on.
PRINTED_AT_MOST = 5
#: From then on, loggers get the table of incidents anew after so many of a kind, and at the end.
LOGGED_EVERY = 50
#: Rows of that table, and how many of them are told in a sentence below.
ROWS = 30
DETAILED = 5


class _Journal:
    """Where the incidents of one Trainer are written, and how many there were."""

    def __init__(self, folder: Path | None, writes: bool) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        self.said: Counter[tuple[str, str]] = Counter()
        self.recent: deque[Incident] = deque(maxlen=ROWS)
        self._writes = writes

    @property
    def path(self) -> Path | None:
        return self.folder / "incidents.jsonl" if self.folder and self._writes else None

    def write(self, incident: Incident) -> None:
        self.recent.appendleft(incident)
        if self.path is None:
            return
        record = dataclasses.asdict(incident)
        if incident.value is not None and not math.isfinite(incident.value):
            record["value"] = str(incident.value)  # JSON has no NaN
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            warnings.warn(f"incidents are no longer written to a file: {error}", stacklevel=4)
            self._writes = False


_journals: WeakKeyDictionary[pl.Trainer, _Journal] = WeakKeyDictionary()


def open_journal(trainer: pl.Trainer, folder: str | None = None) -> None:
    """Choose where incidents are written. Collective: called on every rank.

    Args:
        trainer: The Trainer about to fit.
        folder: The folder of `incidents.jsonl`; the run's own folder if `None`. The first callback that
            names a folder decides.
    """
    own = _folder_of_run(trainer)
    if folder is not None or trainer not in _journals:
        is_real = not trainer.fast_dev_run  # type: ignore[attr-defined]
        _journals[trainer] = _Journal(Path(folder or own) if is_real else None, trainer.is_global_zero)


def _folder_of_run(trainer: pl.Trainer) -> Path:
    """Lightning's own folder of the run; with loggers that have one for all runs, that of checkpoints."""
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    # asked on every rank, whatever loggers it has: a service names a run on rank 0 only
    return folder.joinpath(*gather_objects(_name_of_run(trainer.logger))[0])


def _name_of_run(logger: Any) -> tuple[str, ...]:
    if logger is None or any(is_instance_by_name(logger, own) for own in ("TensorBoardLogger", "CSVLogger")):
        return ()
    try:
        name, version = str(logger.name), logger.version
    except Exception:  # a service that cannot be reached; it costs its records, never the run
        return ()
    return name, version if isinstance(version, str) else f"version_{version}"


def run_folder(trainer: pl.Trainer) -> Path | None:
    """The folder that incidents are written into, the same on every rank; `None` for none."""
    journal = _journals.get(trainer)
    return journal.folder if journal else None


def incidents_file(trainer: pl.Trainer) -> Path | None:
    """The file that incidents are appended to; `None` where this process writes none."""
    journal = _journals.get(trainer)
    return journal.path if journal else None


def count_incidents(trainer: pl.Trainer) -> dict[str, int]:
    """How often each kind was published in this Trainer's life."""
    journal = _journals.get(trainer)
    return dict(journal.counts) if journal else {}


def publish(trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Incident) -> None:
    """Tell the file, TensorBoard, the console, every callback and the module. Called on all ranks alike.

    Args:
        trainer: The Trainer that runs.
        pl_module: The module in training.
        incident: What happened.
    """
    journal = _journals.setdefault(trainer, _Journal(None, writes=False))
    journal.counts[incident.kind] += 1
    journal.said[incident.kind, incident.cause] += 1
    journal.write(incident)
    times = journal.said[incident.kind, incident.cause]
    if times <= PRINTED_AT_MOST or times % LOGGED_EVERY == 0:
        log_incidents(trainer, batches_that_stepped(trainer))
    if times <= PRINTED_AT_MOST:
        advice = f" {incident.advice}" if times == 1 and incident.advice else ""
        page = ""
        if incident.dossier and journal.folder is not None:
            page = f" Read {journal.folder / incident.dossier / 'index.html'}."
        more = " Further ones are only written down." if times == PRINTED_AT_MOST else ""
        console.print_message(trainer, f"gradguard: {incident.describe()}.{page}{advice}{more}")
    for listener in (*trainer.callbacks, pl_module):  # type: ignore[attr-defined]
        hear = getattr(listener, "on_training_incident", None)
        if callable(hear):
            hear(trainer, pl_module, incident)


def log_incidents(trainer: pl.Trainer, step: int) -> None:
    """Write the table of the last incidents to the loggers that take text.

    Args:
        trainer: The Trainer.
        step: Where on the loggers' axis.
    """
    journal = _journals[trainer]
    metrics.log_text(trainer, "incidents", incident_table(journal.recent, journal.counts), step)


def incident_table(incidents: Collection[Incident], counts: Mapping[str, int]) -> str:
    """Incidents as a table in Markdown, and what to do about them.

    Args:
        incidents: In the order of the rows, the newest first.
        counts: How many of each kind there were in all.

    Example:
        >>> spike = Incident("loss_spike", step=7, epoch=0, batch_idx=7, value=12.0)
        >>> incident_table([spike], {"loss_spike": 1}).splitlines()[4]
        '| 7 | **loss_spike** |  | loss 12 | none |  |'
    """
    detailed = [i for i in incidents if i.detail or i.dossier or len(i.where) > 1]
    advised = {incident.kind: incident.advice for incident in incidents if incident.advice}
    return "\n".join(
        [
            ", ".join(f"{n} {kind}" for kind, n in counts.items()),
            "",
            "| step | what | where | value | done | cause |",
            "|---|---|---|---|---|---|",
            *map(_row, incidents),
            "",
            *map(_detail, detailed[:DETAILED]),
            *(f"\n**{kind}**: {what_to_do}" for kind, what_to_do in advised.items()),
        ]
    )


def _row(incident: Incident) -> str:
    """Narrow, for TensorBoard breaks words in a table that is wider than its page."""
    cells = (
        str(incident.step),
        f"**{incident.kind}**",
        first_names(1, _as_code(incident.where)),
        incident.measured,
        label(incident.action),
        label(incident.cause),
    )
    return "| " + " | ".join(map(markdown.cell, cells)) + " |"


def _detail(incident: Incident) -> str:
    batch = "" if incident.batch_idx is None else f", batch {incident.batch_idx}"
    page = f"Read `{incident.dossier}/index.html`." if incident.dossier else ""
    told = " ".join(filter(None, (incident.detail, page))) or first_names(5, _as_code(incident.where))
    return f"* step {incident.step} (epoch {incident.epoch}{batch}): {markdown.cell(told)}"


def _as_code(names: Sequence[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def incident_now(trainer: pl.Trainer, kind: str, **facts: Any) -> Incident:
    """An incident at the Trainer's present step and epoch, unless the facts say otherwise."""
    now = {"step": trainer.global_step, "epoch": trainer.current_epoch, "batch_idx": None}
    return Incident(kind, **{**now, **facts})
