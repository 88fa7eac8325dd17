"""Publishes incidents: to the file, the loggers, the console, callbacks and the module."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import pytorch_lightning as pl

from lightning_gradguard.core import tags
from lightning_gradguard.core.incidents import (
    RUN_FOLDER,
    Incident,
    IncidentKind,
    first_names,
    label,
    sentence_case,
    title,
)
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.runtime.distributed import gather_objects
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.lightning_api import batches_that_stepped
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.logging import console, metrics
from lightning_gradguard.strict_json import to_json

#: Incidents of one kind and cause that are printed; later ones are only written to the file. One that was not
#: examined is printed once for its reason, and not after those of its kind.
MAX_PRINTED = 5
#: From then on, one table of incidents in so many is logged, and one at the end of the run.
LOGGED_EVERY = 50
#: Rows of that table, and rows with a sentence below it.
MAX_ROWS = 30
MAX_DETAILS = 5
#: Remedies that are repeated at the end of the run; a longer one is not.
MAX_REMEDIES, LONGEST_ADVICE = 3, 300


#: Symptoms with advice for a layer, also where no cause is known.
_LOCATED = ("dead_units", "saturated_units", "vanishing_gradient", "exploding_gradient")


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
        self.counts: Counter[str] = Counter()
        self.published: Counter[tuple[str, str, str]] = Counter()  # by kind, cause, why it was not examined
        self.no_longer_printed: set[str] = set()
        self.explained: dict[str, Incident] = {}  # the first of each cause, or located symptom
        self.recent: deque[Incident] = deque(maxlen=MAX_ROWS)
        self.in_table: set[str] = set()  # code of cures
        self._writes = writes
        self._waits = waits
        self._others = others
        self._unwritten: list[Incident] = []

    def has_several_causes(self, kind: str) -> bool:
        """True if examined incidents of a kind have different causes, or some have one and some do not."""
        return sum(known == kind and not why for known, _, why in self.published) > 1

    def restart(self) -> None:
        """Counts and prints as from the first incident on, in the same file."""
        self.counts.clear()
        self.published.clear()
        self.no_longer_printed.clear()
        self.explained.clear()
        self.recent.clear()
        self.in_table.clear()

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


def known_remedies(trainer: pl.Trainer) -> dict[str, str]:
    """Returns the first remedy of each known cause or layer, by titles of incidents; a long one by place."""
    journal = _journals.get(trainer)
    by_advice: dict[str, list[Incident]] = {}
    for incident in journal.explained.values() if journal else ():
        by_advice.setdefault(incident.advice, []).append(incident)
    remedies: dict[str, str] = {}
    for text, incidents in [*by_advice.items()][:MAX_REMEDIES]:
        is_short = "\n" not in text and len(text) <= LONGEST_ADVICE
        titles = ", ".join(dict.fromkeys(title(incident.kind) for incident in incidents))
        at = f"the cure printed above, at step {incidents[0].step}"
        remedies.setdefault(titles, text if is_short else at)
    return remedies


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
    times, at_most = journal.published[group], MAX_PRINTED if incident.examined else 1
    if times <= MAX_PRINTED or times % LOGGED_EVERY == 0:
        log_incidents(trainer, batches_that_stepped(trainer))
    if not incident.examined and incident.kind in journal.no_longer_printed:
        at_most = 0
    if times <= at_most and incident.kind != "training_diverged":  # its error is what a person reads
        has_advice = times == 1 and incident.advice and prints_advice and not ends_run
        text, _, code = incident.advice.partition("\n")
        is_known = code and _statement(code) in journal.in_table
        text = f"{text.rstrip(':')}, what the table of the check has." if is_known else incident.advice
        advice = f" {text}" if has_advice else ""
        page = ""
        if incident.dossier and journal.folder is not None:
            page = f" See {journal.folder / incident.dossier / 'index.html'}."
        more = ""
        if not incident.examined:
            advice = f" {incident.detail}"  # the advice is that of the step which it follows
            more = " Further ones like it are only written to the file."
        elif times == at_most:
            journal.no_longer_printed.add(incident.kind)
            of_cause = f" of cause {label(incident.cause)}" if incident.cause else " without a cause"
            which = f"{title(incident.kind)}{of_cause if journal.has_several_causes(incident.kind) else ''}"
            more = f" Further incidents of {which} are only written to the file."
        level = logging.INFO if incident.action == "none" else logging.WARNING
        console.print_message(
            trainer,
            f"{incident.describe()}{'; the run stops' if ends_run else ''}.{page}{advice}{more}",
            level,
        )
    for listener in (*trainer.callbacks, pl_module):  # type: ignore[attr-defined]
        on_training_incident = getattr(listener, "on_training_incident", None)
        if callable(on_training_incident):
            on_training_incident(trainer, pl_module, incident)


def remember_cures(trainer: pl.Trainer, cures: Iterable[str]) -> None:
    """Takes note of code that a table has printed, so that an incident with the same code names the table."""
    _journals.setdefault(trainer, _Journal(None, writes=False)).in_table.update(map(_statement, cures))


def _statement(cure: str) -> str:
    """Returns the code of a cure without the comment behind it."""
    return cure.partition("  #")[0]


def log_incidents(trainer: pl.Trainer, step: int) -> None:
    """Logs the table of the latest incidents to the loggers that take text."""
    journal = _journals[trainer]
    metrics.log_text(trainer, tags.INCIDENTS, incident_table(journal.recent, journal.counts), step)


def incident_table(incidents: Collection[Incident], counts: Mapping[str, int]) -> str:
    """Returns incidents as a table in Markdown, with advice below it.

    Example:
        >>> spike = Incident("loss_spike", step=7, epoch=0, batch_idx=7, value=12.0)
        >>> incident_table([spike], {"loss_spike": 1}).splitlines()[4]
        '| 7 | **Loss spike** |  | loss 12 | none |  |'
    """
    rows = _like_ones_together(incidents)
    known = [i for i in incidents if not _is_bare(i)]
    detailed = [i for i in known if i.detail or i.dossier or len(i.where) > 1]
    advised = {incident.kind: incident.advice for incident in incidents if incident.advice}
    return "\n".join(
        [
            describe_counts(counts),
            "",
            "| Step | Incident | Where | Value | Action | Cause |",
            "|---|---|---|---|---|---|",
            *map(_row, rows),
            "",
            *map(_detail, detailed[:MAX_DETAILS]),
            *(f"\n**{sentence_case(title(kind))}**: {advice}" for kind, advice in advised.items()),
        ]
    )


def describe_counts(counts: Mapping[str, int]) -> str:
    """Returns the numbers of incidents in words.

    Example:
        >>> describe_counts({"loss_spike": 2, "rollback": 1})
        'loss spike (2), rollback (1)'
    """
    return ", ".join(f"{title(kind)} ({n})" for kind, n in counts.items())


def _like_ones_together(incidents: Collection[Incident]) -> list[list[Incident]]:
    """Groups neighbours that differ in their step alone; those that were not examined come last."""
    groups = [
        [*members]
        for _, members in groupby(incidents, key=lambda i: (i.kind, i.action, i.cause, i.where, i.detail))
    ]
    return sorted(groups, key=lambda members: _is_bare(members[0]))


def _is_bare(incident: Incident) -> bool:
    """True if there is nothing to read about an incident but its kind, as if it was not examined."""
    is_known = incident.where or incident.cause or (incident.detail and incident.examined)
    return incident.action == "skipped" and not is_known


def _row(members: Sequence[Incident]) -> str:
    """Returns a narrow row, for TensorBoard breaks words in a table that is wider than its page."""
    incident, first = members[0], min(i.step for i in members)
    last = max(i.step for i in members)
    times = f" ({len(members)} times)" if len(members) > 1 else ""
    cells = (
        str(first) if first == last else f"{first} to {last}",
        f"**{sentence_case(title(incident.kind))}**{times}",
        first_names(1, _as_code(incident.where)),
        incident.measured,
        label(incident.action),
        label(incident.cause) or ("not examined" if _is_bare(incident) else ""),
    )
    return "| " + " | ".join(map(markdown_cell, cells)) + " |"


def _detail(incident: Incident) -> str:
    batch = "" if incident.batch_idx is None else f", batch {incident.batch_idx}"
    page = f"See `{incident.dossier}/index.html`." if incident.dossier else ""
    text = " ".join(filter(None, (incident.detail, page))) or first_names(5, _as_code(incident.where))
    return f"* Step {incident.step} (epoch {incident.epoch}{batch}): {markdown_cell(text)}"


def _as_code(names: Sequence[str]) -> list[str]:
    return [f"`{name}`" for name in names]


def markdown_cell(text: str) -> str:
    r"""Returns text that stays within its cell of a Markdown table.

    Example:
        >>> print(markdown_cell("a|b"))
        a\|b
    """
    return " ".join(text.split()).replace("|", "\\|")


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
