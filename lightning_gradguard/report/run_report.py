"""All that is said of one run, before it becomes text, a page or JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import median

from lightning_gradguard.core.incidents import label, title
from lightning_gradguard.report.analysis.run_log import GradientLog, RecordedIncident, Series
from lightning_gradguard.report.analysis.verdict import Verdict, judge, worst_layers
from lightning_gradguard.report.readers.runs import Run

#: Lines of a timeline that incidents may take; more are folded until they fit.
LINES = 12


@dataclass(frozen=True)
class Entry:
    """A line of the timeline.

    Args:
        first_step: When it began.
        last_step: When it ended; the same for what took one step.
        text: What happened.
    """

    first_step: int
    last_step: int
    text: str


@dataclass(frozen=True)
class LayerFacts:
    """A layer over the whole run; numbers are `None` where they were not logged.

    Args:
        optimizer: Index of the optimizer that trains it.
        name: Of the parameter or module.
        usual_norm: Median of its gradient's norm.
        largest_norm: The largest finite one.
        largest_at: The step of that.
        nonfinite: Logged steps at which it was nonfinite.
        first_weight_norm: Norm of its weights when the run began.
        last_weight_norm: When it ended.
        usual_update_ratio: Median of how far a step moved it, relative to its norm.
    """

    optimizer: int
    name: str
    usual_norm: float | None
    largest_norm: float | None
    largest_at: int | None
    nonfinite: int
    first_weight_norm: float | None
    last_weight_norm: float | None
    usual_update_ratio: float | None


@dataclass(frozen=True)
class Done:
    """What the suite did; `None` where the callback was not there.

    Args:
        skips: Steps skipped.
        rollbacks: Times gone back.
        lost_batches: Batches that left nothing in the weights, by reason.
        ranks: How many ranks have lost some.
        learning_rate_scale: What learning rates were multiplied by in the end.
        learning_rates: The last that optimizers used, by parameter group.
        clipped_share: Share of steps clipped.
    """

    skips: int | None
    rollbacks: int | None
    lost_batches: Mapping[str, int]
    ranks: int
    learning_rate_scale: float | None
    learning_rates: Mapping[str, float]
    clipped_share: float | None

    def sentences(self) -> list[str]:
        """The same in words."""
        said = []
        if self.skips is not None:
            said.append(f"{_times(self.skips, 'step')} skipped, {_times(self.rollbacks or 0, 'rollback')}")
        if self.lost_batches:
            reasons = ", ".join(f"{n} {reason}" for reason, n in self.lost_batches.items())
            total = sum(self.lost_batches.values())
            of = f" of {self.ranks} ranks together" if self.ranks > 1 else ""
            lost = f"{_times(total, 'batch', 'batches')}{of} left nothing in the weights ({reasons})"
            said.append(f"{lost}: lost_batches.rank*.jsonl")
        if self.learning_rate_scale is not None:
            rates = ", ".join(f"{rate:.3g}" for rate in self.learning_rates.values())
            used = f", the last learning rate was {rates}" if rates else ""
            said.append(f"learning rate times {self.learning_rate_scale:.3g} in the end{used}")
        if self.clipped_share is not None:
            said.append(f"{self.clipped_share:.0%} of the steps clipped")
        return said or ["nothing: no callback of the suite that acts has logged anything"]


@dataclass(frozen=True)
class RunReport:
    """All that is said of one run.

    Args:
        run: As it was found.
        verdict: On it.
        largest_norm: The largest finite total norm; `None` if no norms were logged.
        largest_norm_at: Its step.
        worst_layer: The first that a symptom names; empty if none does.
        timeline: In order of steps.
        incidents: How many, by kind.
        layers: The worst first.
        done: What the suite did.
        notes: What a person should know of the reading, and what to log that was not.
    """

    run: Run
    verdict: Verdict
    largest_norm: float | None
    largest_norm_at: int | None
    worst_layer: str
    timeline: Sequence[Entry]
    incidents: Mapping[str, int]
    layers: Sequence[LayerFacts]
    done: Done
    notes: Sequence[str]


def report_on(run: Run) -> RunReport:
    """Say all that is to be said of a run.

    Args:
        run: As it was read.
    """
    log, verdict = run.log, judge(run.log)
    norms = [(value, step) for g in log.gradients for step, value in g.total.finite()]
    largest, largest_at = max(norms, key=lambda point: point[0], default=(None, None))
    return RunReport(
        run=run,
        verdict=verdict,
        largest_norm=largest,
        largest_norm_at=largest_at,
        worst_layer=_worst_layer(run, verdict),
        timeline=_timeline(run, verdict),
        incidents=Counter(incident.kind for incident in log.incidents),
        layers=[
            _layer_facts(name, gradients)
            for gradients in log.gradients
            for name in worst_layers(gradients, verdict)
        ],
        done=_done(run),
        notes=[*run.notes, *_missing(run, verdict)],
    )


def outcome_in_words(report: RunReport) -> str:
    """How the run ended, in one line."""
    outcome = report.verdict.outcome
    facts = [f"{outcome.steps} steps"]
    if outcome.died_at is not None:
        facts = [f"died after {outcome.survived} of {outcome.steps} steps"]
        if outcome.survived is None:
            facts = [
                f"died within the first {outcome.died_at} of {outcome.steps} steps, which were not logged"
            ]
    elif outcome.was_stopped:
        facts = [f"given up after {outcome.steps} steps"]
    if outcome.first_loss is not None and outcome.final_loss is not None:
        final = f"{outcome.final_loss:.4g}" if math.isfinite(outcome.final_loss) else "nonfinite"
        facts.append(f"loss {outcome.first_loss:.4g} to {final}")
    if report.largest_norm is not None:
        facts.append(f"largest gradient norm {_largest_in_words(report)}")
    return ", ".join(facts)


def _largest_in_words(report: RunReport) -> str:
    logged = f"{short(report.largest_norm)}{{}} at step {report.largest_norm_at}"
    told = report.run.log.largest_norm
    largest = report.largest_norm or 0.0
    if told is None or told <= largest or short(told) == short(largest):
        return logged.format("")
    return f"{short(told)} ({logged.format(' among logged steps,')})"


def compared(reports: Sequence[RunReport]) -> list[tuple[str, ...]]:
    """Several runs side by side: a head, and a row for each.

    Args:
        reports: On the runs.
    """
    head = ("run", "verdict", "survived", "final loss", "max norm", "skips", "rollbacks", "worst layer")
    return [head, *map(_row, reports)]


def _row(report: RunReport) -> tuple[str, ...]:
    outcome, done = report.verdict.outcome, report.done
    return (
        report.run.name,
        report.verdict.headline,
        "-" if outcome.survived is None else f"{outcome.survived} of {outcome.steps}",
        short(outcome.final_loss),
        short(report.largest_norm),
        "-" if done.skips is None else str(done.skips),
        "-" if done.rollbacks is None else str(done.rollbacks),
        report.worst_layer or "-",
    )


def layer_table(report: RunReport, at_most: int) -> list[tuple[str, ...]]:
    """The worst layers: a head, and a row for each.

    Args:
        report: On the run.
        at_most: How many.
    """
    head = ("layer", "usual norm", "largest", "at step", "nonfinite", "update ratio")
    rows = [
        (
            layer.name
            if len(report.run.log.gradients) < 2
            else f"{layer.name} (optimizer {layer.optimizer})",
            short(layer.usual_norm),
            short(layer.largest_norm),
            "-" if layer.largest_at is None else str(layer.largest_at),
            str(layer.nonfinite),
            short(layer.usual_update_ratio),
        )
        for layer in report.layers[:at_most]
    ]
    return [head, *rows] if rows else []


def things_to_do(report: RunReport) -> list[str]:
    """The remedies of all symptoms, those of the worst first, each once, without what was in place."""
    log = report.run.log
    in_place = {
        "AdaptiveGradientClipping()": any(len(g.clip_fraction) for g in log.gradients),
        "NaNRollback()": len(log.skips) > 0,
    }
    known = [callback for callback, is_there in in_place.items() if is_there]
    told = dict.fromkeys(remedy for s in report.verdict.symptoms for remedy in s.remedies)
    return [remedy for remedy in told if not any(callback in remedy for callback in known)]


def short(value: float | None) -> str:
    """A number for a table.

    Example:
        >>> short(12345.678), short(float("nan")), short(None)
        ('1.23e+04', 'nonfinite', '-')
    """
    return "-" if value is None else f"{value:.3g}" if math.isfinite(value) else "nonfinite"


def span(entry: Entry) -> str:
    """When an entry of the timeline was.

    Example:
        >>> span(Entry(40, 58, "12 times nonfinite loss, skipped"))
        'steps 40 to 58'
    """
    first, last = entry.first_step, entry.last_step
    return f"step {first}" if first == last else f"steps {first} to {last}"


def _worst_layer(run: Run, verdict: Verdict) -> str:
    """The first that a symptom names; what is at fault can be the batch as well, which is no layer."""
    layers = [name for g in run.log.gradients for name in g.layers]
    named = (name for symptom in verdict.symptoms for name in symptom.where)
    return next((n for n in named if any(f"{layer}.".startswith(f"{n}.") for layer in layers)), "")


def _timeline(run: Run, verdict: Verdict) -> list[Entry]:
    told = {incident.kind for incident in run.log.incidents}
    entries = []
    for symptom in verdict.symptoms:
        if symptom.kind not in told:
            where = f" at {symptom.where[0]}" if symptom.where else ""
            entries.append(Entry(symptom.since, symptom.since, f"{title(symptom.kind)}{where}, seen first"))
    entries += _folded(run.log.incidents) if told else _counted(run)
    died_at = verdict.outcome.died_at
    if died_at is not None:
        entries.append(Entry(died_at, died_at, "nonfinite from here to the end"))
    return sorted(entries, key=lambda entry: entry.first_step)


def _folded(incidents: Sequence[RecordedIncident]) -> list[Entry]:
    """Incidents as entries: repeats in one, and so few of those that a person reads them."""

    def what(incident: RecordedIncident) -> tuple[str, str]:
        return incident.kind, incident.action

    ordered = sorted(incidents, key=lambda incident: incident.step)
    groups = [list(members) for _, members in groupby(ordered, key=what)]
    gaps = sorted(
        range(1, len(groups)), key=lambda i: groups[i - 1][-1].step - groups[i][0].step
    )  # the widest first
    boundaries = {0, *gaps[: LINES - 1]}
    merged: list[list[RecordedIncident]] = []
    for i, group in enumerate(groups):
        if i in boundaries:
            merged.append([])
        merged[-1].extend(group)
    return [_entry(members) for members in merged]


def _entry(members: Sequence[RecordedIncident]) -> Entry:
    first, last = members[0].step, members[-1].step
    if len(members) > 1:
        counts = Counter((incident.kind, incident.action) for incident in members)
        texts = [
            f"{f'{n} times ' if n > 1 else ''}{_single(kind)}{_answer(kind, action)}"
            for (kind, action), n in counts.items()
        ]
        return Entry(first, last, "; ".join(texts))
    incident = members[0]
    where = f" at {incident.where[0]}" if incident.where else ""
    if incident.kind == "rollback" and incident.value is not None:
        return Entry(first, last, f"rollback to the weights of step {incident.value:.0f}")
    if incident.kind == "learning_rate_backoff" and incident.value is not None:
        return Entry(first, last, f"learning rate lowered, from here on times {incident.value:.3g}")
    cause = f"; cause: {label(incident.cause)}" if incident.cause else ""
    return Entry(
        first, last, f"{_single(incident.kind)}{where}{_answer(incident.kind, incident.action)}{cause}"
    )


def _single(kind: str) -> str:
    return label(kind)


def _answer(kind: str, action: str) -> str:
    return "" if action == "none" or kind in ("rollback", "learning_rate_backoff") else f", {label(action)}"


def _counted(run: Run) -> list[Entry]:
    """What counters tell, where there is no file of incidents."""
    entries = []
    for series, what in ((run.log.skips, "skipped"), (run.log.rollbacks, "rolled back")):
        points = list(zip(series.steps, series.values, strict=True))
        grown = [(s, b - a) for (_, a), (s, b) in zip(points, points[1:], strict=False) if b > a]
        if grown:
            entries.append(Entry(grown[0][0], grown[-1][0], f"{sum(n for _, n in grown):.0f} times {what}"))
    return entries


def _layer_facts(name: str, gradients: GradientLog) -> LayerFacts:
    series = gradients.layers[name]
    finite = series.finite()
    norms = [value for _, value in finite]
    largest_at, largest = max(finite, key=lambda point: point[1], default=(None, None))
    weights = gradients.weights[name].finite() if name in gradients.weights else []
    ratios = [v for _, v in gradients.ratios[name].finite()] if name in gradients.ratios else []
    return LayerFacts(
        optimizer=gradients.optimizer,
        name=name,
        usual_norm=median(norms) if norms else None,
        largest_norm=largest,
        largest_at=largest_at,
        nonfinite=len(series) - len(finite),
        first_weight_norm=weights[0][1] if weights else None,
        last_weight_norm=weights[-1][1] if weights else None,
        usual_update_ratio=median(ratios) if ratios else None,
    )


def _done(run: Run) -> Done:
    log = run.log
    fractions = [value for g in log.gradients for _, value in g.clip_fraction.finite()]
    return Done(
        skips=_last_count(log.skips),
        rollbacks=_last_count(log.rollbacks),
        lost_batches=dict(run.lost_batches),
        ranks=run.ranks,
        learning_rate_scale=log.backoff_scale.values[-1] if len(log.backoff_scale) else None,
        learning_rates={group: series.values[-1] for group, series in run.rates.items()},
        clipped_share=sum(fractions) / len(fractions) if fractions else None,
    )


def _missing(run: Run, verdict: Verdict) -> list[str]:
    notes = []
    if not run.log.gradients and not len(run.log.loss):
        notes.append("there is neither a loss nor a gradient norm in it; add GradientNormMonitor()")
    elif not run.log.gradients:
        alone = f"there are no gradient norms, the verdict rests on {run.loss_tag} alone"
        notes.append(f"{alone}; add GradientNormMonitor()")
    elif not any(g.layers for g in run.log.gradients):
        notes.append("there is a total norm alone; GradientNormMonitor() tells which layer is at fault")
    elif not len(run.log.loss):
        notes.append("there is no training loss in it; log one, as self.log('train_loss', loss)")
    if verdict.status == "unknown" and verdict.outcome.steps:
        notes.append("log more often, or train for longer, to have it judged: Trainer(log_every_n_steps=10)")
    return notes


def _last_count(series: Series) -> int | None:
    counts = series.finite()
    return int(counts[-1][1]) if counts else None


def _times(n: int, what: str, several: str = "") -> str:
    return f"{n} {what}" if n == 1 else f"{n} {several or f'{what}s'}"
