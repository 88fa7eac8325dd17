"""What a run came to, told once at its end: a table, and the final counts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytorch_lightning as pl

from lightning_gradguard.runtime.incidents.journal import (
    count_incidents,
    incidents_file,
    log_incidents,
)
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.logging import console, markdown, metrics
from lightning_gradguard.runtime.logging.console import relative_to_cwd, shell_command
from lightning_gradguard.runtime.logging.hyperparameters import hyperparameters_of

#: Final counts in the order of the table: what a person calls them, and how they are written.
_ROWS = {
    "rollback/skips": ("steps skipped", "{:.0f}"),
    "rollback/rollbacks": ("rollbacks", "{:.0f}"),
    "rollback/amp_overflows": ("AMP overflows", "{:.0f}"),
    "lr_backoff/scale": ("learning rate scale", "{:.3g}"),
    "summary/clipped_fraction": ("steps clipped", "{:.1%}"),
    "summary/largest_norm": ("largest norm", "{:.3g}"),
    "summary/largest_logged_norm": ("largest logged norm", "{:.3g}"),
}


def summarize(
    trainer: pl.Trainer,
    counts: Mapping[str, float],
    first_step: int,
    step: int,
    last_logged: Mapping[str, tuple[int, float]],
) -> None:
    """Tell the console and the loggers what a run came to. Local: nothing is asked of other ranks.

    Args:
        trainer: The Trainer that has ended to fit, or was interrupted.
        counts: Final counts of the callbacks, by tag.
        first_step: The first step, on the loggers' axis; above 0 in a run that was resumed.
        step: The last one.
        last_logged: By tag, the step at which it was logged last, and its value then; what the last step has
            is not logged again.
    """
    incidents = count_incidents(trainer)
    settings = hyperparameters_of(trainer.callbacks)  # type: ignore[attr-defined]
    final = {**counts, "summary/incidents": sum(incidents.values())}
    news = {tag: count for tag, count in final.items() if last_logged.get(tag) != (step, count)}
    metrics.log_scalars(trainer, news, step)
    metrics.log_hyperparameters(trainer, settings)
    rows = {"steps": str(trainer.global_step), **_told(counts), "incidents": _listed(incidents)}
    if first_step > 0:
        # what callbacks keep in checkpoints is of the whole run, the rest of this part of it
        rows["resumed"] = f"at step {first_step}; skips, rollbacks and scale are of the whole run"
    metrics.log_text(trainer, "summary", _markdown({**rows, **settings}), step)
    if incidents:
        log_incidents(trainer, step)
        console.print_last_message(trainer, _table({**rows, **_ways_on(trainer)}))
    else:
        facts = _told({tag: value for tag, value in counts.items() if tag.startswith("summary/")})
        told = ", ".join([f"{rows['steps']} steps", *(f"{name} {value}" for name, value in facts.items())])
        since = f" since step {first_step}, where it was resumed" if first_step > 0 else ""
        console.print_last_message(trainer, f"gradguard: no incident{since}; {told}.")


def _told(counts: Mapping[str, float]) -> dict[str, str]:
    return {name: form.format(counts[tag]) for tag, (name, form) in _ROWS.items() if counts.get(tag)}


def _listed(incidents: Mapping[str, int]) -> str:
    often = sorted(incidents.items(), key=lambda item: -item[1])
    return ", ".join(f"{kind} {n}" for kind, n in often) or "none"


def _ways_on(trainer: pl.Trainer) -> dict[str, str]:
    """Where everything is written down, and what to type to read it."""
    ways = {}
    if (file := incidents_file(trainer)) is not None:
        ways["written in"] = relative_to_cwd(file)
        if (dossiers := file.parent / "incidents").is_dir():
            ways["lost batches"] = f"{relative_to_cwd(dossiers)}, a page each"
        ways["to read on"] = f"{shell_command('lightning-gradguard')} report {relative_to_cwd(file.parent)}"
    for logger in trainer.loggers:
        if is_instance_by_name(logger, "TensorBoardLogger"):
            ways["to see charts"] = (
                f"{shell_command('tensorboard')} --logdir {relative_to_cwd(Path(str(logger.root_dir)))}"
            )
    return ways


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(["gradguard: what this run came to", *(f"  {k:{width}}  {v}" for k, v in rows.items())])


def _markdown(rows: Mapping[str, object]) -> str:
    cells = (f"| {name} | {markdown.cell(str(value))} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])
