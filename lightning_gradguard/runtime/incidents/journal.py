"""Publishes incidents: to the file, the loggers, the console, callbacks and the module."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import chain, count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl

from lightning_gradguard.core import tags
from lightning_gradguard.core.incidents import (
    RUN_FOLDER,
    Incident,
    IncidentKind,
    label,
    title,
)
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.runtime.distributed import gather_objects
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.incidents.table import incident_table
from lightning_gradguard.runtime.lightning_api import batches_that_stepped
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.logging import console, metrics
from lightning_gradguard.strict_json import to_json

#: Incidents of one kind and cause that are printed; later ones are only written to the file. One that was not
#: examined is printed once for its reason, and not after those of its kind.
MAX_PRINTED = 5
#: From then on, one table of incidents in so many is logged, and one at the end of the run.
LOGGED_EVERY = 50
#: Rows of that table.
MAX_ROWS = 30


#: Symptoms of layers, which have advice also where no cause is known.
_LOCATED = ("dead_units", "saturated_units", "vanishing_gradient", "exploding_gradient", "gradient_collapse")


class _Journal:
    """The incidents of one Trainer: counts, the latest, and the file.

    Args:
        folder: Of the file; `None` for none.
        writes: False on ranks that write no file.
        waits: True to write nothing before the first intervention, or the first dossier: findings alone make
            no file where none is asked for.
        others: Folders of loggers with metrics of the same run; each gets a file that names the folder.
    """

    def __init__(
        self, folder: Path | None, *, writes: bool, waits: bool = False, others: Sequence[Path] = ()
    ) -> None:
        self.folder = folder
        self._writes = writes
        self._waits = waits
        self._others = others
        self._unwritten: list[Incident] = []
        self.restart()

    def restart(self) -> None:
        """Counts and prints as from the first incident on, in the same file."""
        self.counts: Counter[str] = Counter()
        self.published: Counter[tuple[str, str, str]] = Counter()  # by kind, cause, why it was not examined
        self.no_longer_printed: set[str] = set()
        self.explained: dict[str, Incident] = {}  # the first of each cause, or located symptom
        self.recent: deque[Incident] = deque(maxlen=MAX_ROWS)
        self.in_table: set[str] = set()  # cures

    def in_words(self, incident: Incident, *, has_advice: bool, ends_run: bool, is_last: bool) -> str:
        """Returns the message on an incident, the last that is printed of those like it or not."""
        page = more = ""
        if incident.dossier and self.folder is not None:
            page = f"See {self.folder / incident.dossier / 'index.html'}."
        text, _, code = incident.advice.partition("\n")
        is_known = code and _statement(code) in self.in_table
        text = f"{text.rstrip(':')}, what the table of the check has." if is_known else incident.advice
        if text and any(text in cure for cure in self.in_table):
            text = "The table of the check has its cure."
        advice = text if has_advice else ""
        if not incident.examined:
            advice = incident.detail  # the advice is that of the step which it follows
            more = "Further ones like it are only written to the file."
        elif is_last:
            of_cause = f" of cause {label(incident.cause)}" if incident.cause else " without a cause"
            # examined incidents of the kind have different causes, or some have one and some do not
            is_one_of_several = sum(kind == incident.kind and not why for kind, _, why in self.published) > 1
            which = f"{title(incident.kind, incident.cause)}{of_cause if is_one_of_several else ''}"
            more = f"Further incidents of {which} are only written to the file."
        sentences = f"{incident.describe()}{'; the run stops' if ends_run else ''}.", page, advice, more
        return " ".join(filter(None, sentences))

    @property
    def path(self) -> Path | None:
        return self.folder / "incidents.jsonl" if self.folder and self._writes else None

    def write(self, incident: Incident) -> None:
        self.recent.appendleft(incident)
        if self.path is None:
            return
        self._unwritten.append(incident)
        self._waits = self._waits and incident.action == "none" and not incident.dossier
        if self._waits:
            return
        unwritten, self._unwritten = self._unwritten, []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            (self.path.parent / RUN_FOLDER).unlink(missing_ok=True)  # of an earlier run in this folder
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(to_json(dataclasses.asdict(one)) + "\n" for one in unwritten)
            others, self._others = self._others, ()
            for folder in others:
                folder.mkdir(parents=True, exist_ok=True)
                there = os.path.relpath(self.path.parent, folder)
                (folder / RUN_FOLDER).write_text(f"{there}\n", encoding="utf-8")
        except OSError as error:
            warnings.warn(f"Incidents are no longer written to a file: {error}", stacklevel=4)
            self._writes = False


_journals: WeakKeyDictionary[pl.Trainer, _Journal] = WeakKeyDictionary()


def open_journal(trainer: pl.Trainer, folder: str | None = None) -> None:
    """Chooses the folder that incidents are written to. Collective: called on every rank.

    A given one takes the place of that of an open journal; `None` is the run's own one where no journal is
    open. Without a logger, findings alone are not written there.
    """
    if folder is None and trainer in _journals:
        return
    path = _folder_of_run(trainer) if folder is None else Path(folder)
    is_real = not trainer.fast_dev_run  # type: ignore[attr-defined]
    writes = trainer.is_global_zero
    names = [own.log_dir for own in trainer.loggers if _has_folder(own)] if writes else []
    folders = [Path(name) for name in names if name is not None]
    _journals[trainer] = _Journal(
        path if is_real else None,
        writes=writes,
        waits=folder is None and not trainer.loggers,
        others=[other for other in folders if other.resolve() != path.resolve()],
    )


def begin_journal(trainer: pl.Trainer) -> None:
    """Opens the journal of a fit: its counts begin, while its file is that of a fit before. Collective."""
    open_journal(trainer)
    _journals[trainer].restart()


def set_aside_earlier_run(trainer: pl.Trainer) -> None:
    """Renames records in the logger's folder, as of a fixed `version`, if this run resumes none of them.

    A folder that was named for them may be that of several runs at a time, and is left as it is.
    """
    file = incidents_file(trainer)
    if file is None or trainer.global_step > 0 or count_incidents(trainer):
        return
    if str(file.parent) in [str(logger.log_dir) for logger in trainer.loggers if hasattr(logger, "log_dir")]:
        for earlier in (file, *file.parent.glob("lost_batches.rank*.jsonl")):
            with suppress(OSError):  # most folders are new
                earlier.replace(f"{earlier}.1")


def _folder_of_run(trainer: pl.Trainer) -> Path:
    """Returns the folder of the run, of the logger whose metrics `report` finds there if there is one.

    Of other loggers, which share one folder between runs, it is that of checkpoints.
    """
    logger = next((own for own in trainer.loggers if _has_folder(own)), None)
    log_dir: Any = trainer.log_dir if logger is None else trainer.strategy.broadcast(logger.log_dir)
    is_path = log_dir and isinstance(log_dir, (str, os.PathLike))  # a logger may be a mock
    folder = Path(log_dir if is_path else trainer.default_root_dir)
    # on every rank, with any loggers: a service names a run on rank 0 only
    own = gather_objects(_name_of_run(logger or trainer.logger) or _own_subfolder(trainer, folder))[0]
    return folder.joinpath(*own)


def _own_subfolder(trainer: pl.Trainer, folder: Path) -> tuple[str, ...]:
    """Returns `version_<n>` if the folder belongs to no logger, and has the incidents of an earlier run."""
    if trainer.loggers:
        return ()
    candidates = chain([()], ((f"version_{n}",) for n in count(1)))
    return next(own for own in candidates if not _has_content(folder.joinpath(*own, "incidents.jsonl")))


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0


def _has_folder(logger: Any) -> bool:
    """True if each run has a folder of its own, with its metrics."""
    return any(is_instance_by_name(logger, own) for own in ("TensorBoardLogger", "CSVLogger"))


def _name_of_run(logger: Any) -> tuple[str, ...]:
    if logger is None or _has_folder(logger):
        return ()
    try:
        name, version = logger.name, logger.version
    except Exception:  # an unreachable service costs its records, never the run
        return ()
    if not isinstance(name, str | None) or not isinstance(version, str | int | None):  # of a mock
        return ()
    return str(name), version if isinstance(version, str) else f"version_{version}"


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Returns the folder that incidents are written to, the same on every rank; `None` for none."""
    journal = _journals.get(trainer)
    return journal.folder if journal else None


def incidents_file(trainer: pl.Trainer) -> Path | None:
    """Returns the file that incidents are appended to; `None` where this process writes none."""
    journal = _journals.get(trainer)
    return journal.path if journal else None


def count_incidents(trainer: pl.Trainer) -> dict[str, int]:
    """Returns how often each kind was published by this Trainer."""
    journal = _journals.get(trainer)
    return dict(journal.counts) if journal else {}


def count_titles(trainer: pl.Trainer) -> Counter[str]:
    """Returns how often incidents of each title were published by this Trainer."""
    counts: Counter[str] = Counter()
    for (kind, cause, _), n in _journals[trainer].published.items() if trainer in _journals else ():
        counts[title(kind, cause)] += n
    return counts


def advice_of_error(trainer: pl.Trainer) -> str:
    """Returns the advice of the error that ends the run of this Trainer; empty without one."""
    recent = _journals[trainer].recent if trainer in _journals else ()
    return next((incident.advice for incident in recent if incident.kind == "training_diverged"), "")


def explained_incidents(trainer: pl.Trainer) -> list[Incident]:
    """Returns the first incident of each known cause, or located symptom, that has advice."""
    journal = _journals.get(trainer)
    return [*journal.explained.values()] if journal else []


def publish(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    incident: Incident,
    *,
    prints_advice: bool = True,
    ends_run: bool = False,
) -> None:
    """Publishes an incident to file, loggers, console, callbacks and module. Called on all ranks alike.

    Args:
        trainer: The Trainer.
        pl_module: The module.
        incident: The incident.
        prints_advice: False if what is printed next has the advice.
        ends_run: True if it stops the run, with an error that has the advice.
    """
    journal = _journals.setdefault(trainer, _Journal(None, writes=False))
    journal.counts[incident.kind] += 1
    group = incident.kind, incident.cause, "" if incident.examined else incident.detail
    journal.published[group] += 1
    if incident.advice and (incident.is_explained or incident.kind in _LOCATED):
        journal.explained.setdefault(incident.cause or incident.kind, incident)
    journal.write(incident)
    times = journal.published[group]
    if times <= MAX_PRINTED or times % LOGGED_EVERY == 0:
        log_incidents(trainer, batches_that_stepped(trainer))
    at_most = MAX_PRINTED if incident.examined else int(incident.kind not in journal.no_longer_printed)
    if times <= at_most and incident.kind != "training_diverged":  # its error is what a person reads
        has_advice, is_last = times == 1 and prints_advice and not ends_run, times == at_most
        text = journal.in_words(incident, has_advice=has_advice, ends_run=ends_run, is_last=is_last)
        if incident.examined and is_last:
            journal.no_longer_printed.add(incident.kind)
        console.print_message(trainer, text, logging.INFO if incident.action == "none" else logging.WARNING)
    for listener in (*trainer.callbacks, pl_module):  # type: ignore[attr-defined]
        on_training_incident = getattr(listener, "on_training_incident", None)
        if callable(on_training_incident):
            on_training_incident(trainer, pl_module, incident)


def remember_cures(trainer: pl.Trainer, cures: Iterable[str]) -> None:
    """Takes note of cures that a table has printed, so that an incident with one of them names the table."""
    _journals.setdefault(trainer, _Journal(None, writes=False)).in_table.update(map(_statement, cures))


def is_in_table(trainer: pl.Trainer, advice: str) -> bool:
    """True if a table has printed the cure that an advice has."""
    return any(cure in advice or advice in cure for cure in _journals[trainer].in_table)


def _statement(cure: str) -> str:
    """Returns the code of a cure without the comment behind it."""
    return cure.partition("  #")[0]


def log_incidents(trainer: pl.Trainer, step: int) -> None:
    """Logs the table of the latest incidents to the loggers that take text."""
    journal = _journals[trainer]
    metrics.log_text(trainer, tags.INCIDENTS, incident_table(journal.recent, count_titles(trainer)), step)


def incident_now(trainer: pl.Trainer, kind: IncidentKind | str, **facts: Any) -> Incident:
    """Returns an incident at the Trainer's step and epoch, with the advice for its kind.

    Facts come first, also where they are a step, an epoch or advice.
    """
    now = {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batch_idx": None,
        "advice": advice(kind, facts.get("where", ()), present_in(trainer)),
    }
    return Incident(kind, **{**now, **facts})
