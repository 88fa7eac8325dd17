"""Summary of a run at its end: a table, and the final counts."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytorch_lightning as pl

from lightning_gradguard.core import tags
from lightning_gradguard.core.detectors import Explosion, describe_clipping, percent
from lightning_gradguard.core.detectors.best_constant import describe_loss
from lightning_gradguard.core.incidents import CURE, HELD, Incident, title
from lightning_gradguard.core.remedies import advice, remedies
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.journal import (
    advice_of_error,
    count_incidents,
    count_titles,
    explained_incidents,
    incident_now,
    incidents_file,
    is_in_table,
    log_incidents,
    publish,
)
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.incidents.table import describe_counts, markdown_cell
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.logging import console, metrics
from lightning_gradguard.runtime.logging.console import relative_to_cwd, shell_command
from lightning_gradguard.runtime.logging.hyperparameters import hyperparameters_of

#: Above this, a run without an incident is not called clean: clipping acts on most steps.
USUAL_CLIPPED_FRACTION = 0.5
#: Remedies that are repeated at the end of the run; a longer one is not.
MAX_REMEDIES, LONGEST_ADVICE = 3, 300
TITLE = "Run summary"
#: Final counts in the order of the table: name and how it is printed.
_ROWS = {
    tags.SKIPS: ("steps skipped", "{:.0f}".format),
    tags.ROLLBACKS: ("rollbacks", "{:.0f}".format),
    tags.AMP_OVERFLOWS: ("AMP overflows", "{:.0f}".format),
    tags.LR_SCALE: ("learning rate scale", "{:.3g}".format),
    tags.UNSCALED_ROLLBACKS: (
        "learning rate",
        "unchanged by {:.0f} of the rollbacks: no group has 'lr'".format,
    ),
    tags.ROLLBACKS_AT_ANY_RATE: (
        "learning rate",
        "unchanged by {:.0f} of the rollbacks, whose cause is not the rate".format,
    ),
    tags.FOUND_LR: ("train with", f"lr={{:.3g}}, {HELD}".format),
    tags.CLIPPED_FRACTION: ("steps clipped", percent),
    tags.LARGEST_NORM: ("largest norm", "{:.3g}".format),
    tags.LARGEST_LOGGED_NORM: ("largest logged norm", "{:.3g}".format),
}


@dataclass
class RunTotals:
    """Totals of a run, reported when it ends.

    Args:
        first_step: That at which the fit began, on the loggers' axis: above 0 if it was resumed.
        last_step: The last one.
        largest_norm: The largest total norm of accepted gradients that reached the host.
        has_all_norms: True if every step's norm reached the host, and not that of logged steps alone.
        explosion: The largest of these norms that was far above those before it.
        nonfinite_since: Step and epoch of the first accepted gradients whose norm was seen not to be finite.
    """

    first_step: int
    last_step: int
    largest_norm: float = 0.0
    has_all_norms: bool = False
    explosion: Explosion = field(default_factory=Explosion)
    nonfinite_since: dict[str, int] | None = None


def summarize(
    trainer: pl.Trainer,
    counts: Mapping[str, float],
    totals: RunTotals,
    last_logged: Mapping[str, tuple[int, float]],
    counts_since: int = 0,
) -> None:
    """Prints and logs the summary of a run. Local: needs no other rank.

    Args:
        trainer: The Trainer.
        counts: Final counts, by tag.
        totals: Totals of the run.
        last_logged: The last step and value that were logged, by tag.
        counts_since: Step from which on skips and rollbacks are counted.
    """
    first_step, step = totals.first_step, totals.last_step
    _publish_nonfinite(trainer, counts, totals)
    incidents, known = count_incidents(trainer), _known_remedies(trainer)
    settings = hyperparameters_of(trainer.callbacks)  # type: ignore[attr-defined]
    final = {**counts, tags.N_INCIDENTS: sum(incidents.values())}
    # counts that are logged at the last step already are not logged again
    scalars = {tag: count for tag, count in final.items() if last_logged.get(tag) != (step, count)}
    metrics.log_scalars(trainer, scalars, step)
    metrics.log_hyperparameters(trainer, settings)
    n_optimizers = len(trainer.optimizers)
    batches = lightning_api.batches_that_stepped(trainer)
    by_each = f" of {n_optimizers} optimizers, in {batches} batches" * (n_optimizers > 1)
    rows = {
        "steps": f"{trainer.global_step}{by_each}",
        **_formatted(counts, trainer.global_step - counts_since),
        "incidents": describe_counts(dict(count_titles(trainer).most_common())) or "none",
    }
    if unusual := _unusual(
        counts,
        totals.explosion.largest,
        incidents,
        is_explained=bool(known),
        is_treated="treatment" in present_in(trainer),
    ):
        rows["unusual"] = "; ".join(text for text, _ in unusual.values())
    if first_step > 0:
        # counts in checkpoints are of the whole run, the others of this part of it
        counted = f"counted since step {counts_since}" if counts_since else "of the whole run"
        rows["resumed"] = f"at step {first_step}; skips and rollbacks are {counted}"
    metrics.log_text(trainer, tags.SUMMARY, _markdown({**rows, **settings}), step)
    is_clean = not incidents and not unusual
    if not is_clean:
        if incidents:
            log_incidents(trainer, step)
        lines = [TITLE, *_aligned({**rows, **_folders(trainer)})]
        if next_steps := _next_steps(trainer, known, unusual):
            lines += ["Next steps", *_aligned(next_steps)]
        console.print_last_message(trainer, "\n".join(lines))
    else:
        final_only = {tag: count for tag, count in counts.items() if tag.startswith(f"{tags.SUMMARY}/")}
        facts = [
            f"{trainer.global_step} steps{by_each}",
            *(f"{k} {v}" for k, v in _formatted(final_only, 0).items()),
        ]
        since = f" since step {first_step}, where it was resumed" if first_step > 0 else ""
        console.print_last_message(trainer, f"No incident{since}; {', '.join(facts)}.")


def _publish_nonfinite(trainer: pl.Trainer, counts: Mapping[str, float], totals: RunTotals) -> None:
    """Publishes nonfinite gradients of a run in which no callback has skipped, or found, them."""
    # a GradScaler overflows, and skips such a step
    was_watched = tags.SKIPS in counts or lightning_api.gradient_scaler(trainer) is not None
    is_known = {"nonfinite_gradient", "nonfinite_loss"}.intersection(count_incidents(trainer))
    if totals.nonfinite_since is not None and not (was_watched or is_known):
        text = advice("nonfinite_gradient", present={*present_in(trainer), "sampled"})
        incident = incident_now(trainer, "nonfinite_gradient", advice=text, **totals.nonfinite_since)
        publish(trainer, trainer.lightning_module, incident)


def _next_steps(
    trainer: pl.Trainer, known: Mapping[str, str], unusual: Mapping[str, tuple[str, str]]
) -> dict[str, str]:
    """Returns what to do about known causes or, without any, about what is unusual; and the commands."""
    # what is known explains a large norm
    of_unusual = {name: step for name, (_, step) in unusual.items() if name == "clipping" or not known}
    if "stuck_loss" in count_incidents(trainer) and not known:  # its cause is not
        known = {title("stuck_loss"): remedies("stuck_loss")[0]}
    return {**known, **of_unusual, **_commands(trainer)}


def _known_remedies(trainer: pl.Trainer) -> dict[str, str]:
    """Returns the first remedy of each known cause or layer, by titles of incidents.

    A long one, and one that the error which ends the run has, is named by its place.
    """
    by_advice: dict[str, list[Incident]] = {}
    # of a network that is too deep, other weights alone often do not train it
    for incident in sorted(explained_incidents(trainer), key=lambda i: not i.is_of_depth):
        by_advice.setdefault(incident.advice, []).append(incident)
    is_of_depth = any(members[0].is_of_depth for members in by_advice.values())
    known: dict[str, str] = {}
    of_error = advice_of_error(trainer)
    for text, incidents in [*by_advice.items()][:MAX_REMEDIES]:
        is_short = "\n" not in text and len(text) <= LONGEST_ADVICE and text not in of_error
        titles = ", ".join(dict.fromkeys(title(incident.kind, incident.cause) for incident in incidents))
        place = f"printed above, at step {incidents[0].step}"
        if text in of_error:
            place = "in the error that ends the run"
        elif is_in_table(trainer, text):
            place = "in the table of the check, before step 1"
        instead = "Only where that is not possible: " if is_of_depth and text.startswith(CURE) else ""
        known.setdefault(titles, instead + (text if is_short else f"the cure {place}"))
    return known


def _unusual(
    counts: Mapping[str, float],
    explosion: tuple[float, float] | None,
    incidents: Mapping[str, int],
    *,
    is_explained: bool,
    is_treated: bool,
) -> dict[str, tuple[str, str]]:
    """Returns numbers of the whole run that are no incident, and not those of a healthy run either.

    Each is named, and has what to do about it.
    """
    found = {}
    over = counts.get(tags.OVER_CONSTANT)
    if over is not None and "stuck_loss" not in incidents:
        found["loss"] = describe_loss(over), remedies("little_learned", ())[0]
    clipped, largest = counts.get(tags.CLIPPED_FRACTION, 0.0), counts.get(tags.LARGEST_NORM, 0.0)
    coefficient = counts.get(tags.USUAL_COEFFICIENT)
    # a bound that a treatment has chosen was tried as it is
    if clipped > USUAL_CLIPPED_FRACTION and not (is_treated or tags.FOUND_LR in counts):
        found["clipping"] = (
            f"{describe_clipping(clipped, coefficient)}, usual: up to {percent(USUAL_CLIPPED_FRACTION)}",
            advice("constant_clipping", (), ["explained"] if is_explained else [], coefficient),
        )
    if explosion is not None and tags.CLIPPED_FRACTION not in counts:
        found["explosion"] = (
            f"a gradient norm of {explosion[0]:.3g}, after a median of {explosion[1]:.3g}",
            "AdaptiveGradientClipping() clips such steps; if the loss does not fall, lower the learning rate",
        )
    largest = max(largest, counts.get(tags.LARGEST_LOGGED_NORM, 0.0))
    if largest > tags.USUAL_LARGEST_NORM:
        found["norms"] = (
            f"largest gradient norm {largest:.3g}, usual: below {tags.USUAL_LARGEST_NORM:g} for a mean loss",
            remedies("large_norm", ())[0],
        )
    return found


def _formatted(counts: Mapping[str, float], steps: int) -> dict[str, str]:
    """Returns the rows of final counts, of which those of skips are of so many steps."""
    rows = {name: printed(counts[tag]) for tag, (name, printed) in _ROWS.items() if counts.get(tag)}
    if counts.get(tags.LR_SCALE) == 1:
        del rows["learning rate scale"]  # of the configured rate, as if there was no backoff
    if "train with" in rows and "steps clipped" in rows:
        rows["train with"] += ", and with the clipping of this run"
    if 0 < (skips := counts.get(tags.SKIPS, 0)) <= steps:
        rows["steps skipped"] += f" of {steps} ({percent(skips / steps)}); a skip does not mend its cause"
    if "steps skipped" in rows and "largest norm" in rows:
        rows["largest norm"] += " of accepted steps"
    return rows


def _folders(trainer: pl.Trainer) -> dict[str, str]:
    folders = {}
    if (file := incidents_file(trainer)) is not None and file.is_file():
        folders["written to"] = relative_to_cwd(file)
        if (dossiers := file.parent / "incidents").is_dir():
            folders["pages"] = f"{relative_to_cwd(dossiers)}, one for the first skip of each episode"
    return folders


def _commands(trainer: pl.Trainer) -> dict[str, str]:
    commands = {}
    command = shell_command("lightning-gradguard")
    if (file := incidents_file(trainer)) is not None and (trainer.loggers or file.is_file()):
        commands["report"] = f"{command} report {shlex.quote(relative_to_cwd(file.parent))}"
    elif not trainer.loggers:
        commands["report"] = f"give the Trainer a logger: {command} report reads what it writes"
    for logger in trainer.loggers:
        if is_instance_by_name(logger, "TensorBoardLogger"):
            folder = shlex.quote(relative_to_cwd(Path(str(logger.root_dir))))
            commands["charts"] = f"{shell_command('tensorboard')} --logdir {folder}"
    return commands


def _aligned(rows: Mapping[str, str]) -> list[str]:
    width = max(map(len, rows))
    return [f"  {name:{width}}  {value}" for name, value in rows.items()]


def _markdown(rows: Mapping[str, object]) -> str:
    cells = (f"| {name} | {markdown_cell(str(value))} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])
