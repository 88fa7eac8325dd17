"""The report on one run, independent of its rendering."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_gradguard.core.incidents import CURE, SYMPTOM_CAUSES
from lightning_gradguard.report.analysis.gradient_symptoms import clipped_elsewhere
from lightning_gradguard.report.analysis.outcome import RunSymptom
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog, Series
from lightning_gradguard.report.analysis.verdict import RunVerdict, analyze_run, is_within, order_layers
from lightning_gradguard.report.readers.runs import Run
from lightning_gradguard.report.timeline import TimelineEntry, timeline

#: Symptoms that one cause has together.
OF_NETWORKS = (
    *("vanishing_gradient", "exploding_gradient", "gradient_collapse", "weight_stagnation"),
    *("dead_units", "saturated_units", "stuck_loss"),
)
_MONITOR_LOGS = "GradientNormMonitor() logs norms, once in log_every_n_steps of the Trainer"


@dataclass(frozen=True)
class LayerSummary:
    """A layer over the whole run, as `schema.json` describes it; numbers that were not logged are `None`."""

    optimizer: int
    name: str
    median_norm: float | None
    largest_norm: float | None
    largest_norm_at: int | None
    nonfinite: int
    first_weight_norm: float | None
    last_weight_norm: float | None
    median_update_ratio: float | None


@dataclass(frozen=True)
class Interventions:
    """Interventions of the suite, as `schema.json` describes them; `None` without the callback."""

    skips: int | None
    earlier_skips: int
    rollbacks: int | None
    lost_batches: Mapping[str, int]
    ranks: int
    learning_rate_scale: float | None
    learning_rates: Mapping[str, float]
    clipped_share: float | None
    clipped_elsewhere_share: float | None


@dataclass(frozen=True)
class RunReport:
    """The report on one run, as `schema.json` describes it.

    `next_steps` are the remedies of all symptoms, the worst first, each once; before them those
    that were tried in the run, and first those of a network that is too deep.
    """

    run: Run
    verdict: RunVerdict
    largest_norm: float | None
    largest_norm_at: int | None
    worst_layer: str
    timeline: Sequence[TimelineEntry]
    incidents: Mapping[str, int]
    layers: Sequence[LayerSummary]
    interventions: Interventions
    next_steps: Sequence[str]
    notes: Sequence[str]


def report_on(run: Run) -> RunReport:
    """Analyzes a run and summarizes its layers, incidents and interventions."""
    log, verdict = run.log, analyze_run(run.log)
    norms = [(value, step) for g in log.gradients for step, value in g.total.finite()]
    largest, largest_at = max(norms, key=lambda point: point[0], default=(None, None))
    return RunReport(
        run=run,
        verdict=verdict,
        largest_norm=largest,
        largest_norm_at=largest_at,
        worst_layer=_worst_layer(run, verdict),
        timeline=timeline(log, verdict),
        incidents=Counter(incident.kind for incident in log.incidents),
        layers=[_layer_summary(name, g) for g in log.gradients for name in order_layers(g, verdict)],
        interventions=_interventions(run),
        next_steps=_next_steps(verdict),
        notes=[*run.notes, *_missing(run, verdict)],
    )


def _worst_layer(run: Run, verdict: RunVerdict) -> str:
    """Returns the first layer that a symptom names; a symptom may also name a batch, which is no layer."""
    layers = [name for g in run.log.gradients for name in g.layers]
    named = (name for symptom in verdict.symptoms for name in symptom.where)
    return next((n for n in named if any(is_within(layer, n) for layer in layers)), "")


def _layer_summary(name: str, gradients: GradientLog) -> LayerSummary:
    series = gradients.layers[name]
    finite = series.finite()
    norms = [value for _, value in finite]
    largest_at, largest = max(finite, key=lambda point: point[1], default=(None, None))
    weights = gradients.weights[name].finite() if name in gradients.weights else []
    ratios = [v for _, v in gradients.ratios[name].finite()] if name in gradients.ratios else []
    return LayerSummary(
        optimizer=gradients.optimizer,
        name=name,
        median_norm=median(norms) if norms else None,
        largest_norm=largest,
        largest_norm_at=largest_at,
        nonfinite=len(series) - len(finite),
        first_weight_norm=weights[0][1] if weights else None,
        last_weight_norm=weights[-1][1] if weights else None,
        median_update_ratio=median(ratios) if ratios else None,
    )


def _interventions(run: Run) -> Interventions:
    log = run.log
    fractions = [value for g in log.gradients for _, value in g.clip_fraction.finite()]
    elsewhere = [is_clipped for g in log.gradients for is_clipped in clipped_elsewhere(g)]
    return Interventions(
        skips=_count_of(log, log.skips, "skipped"),
        earlier_skips=_earlier_skips(log),
        rollbacks=_count_of(log, log.rollbacks, "rolled_back"),
        lost_batches=dict(run.lost_batches),
        ranks=run.ranks,
        learning_rate_scale=log.backoff_scale.values[-1] if len(log.backoff_scale) else None,
        learning_rates={group: series.values[-1] for group, series in run.rates.items()},
        clipped_share=(
            log.clipped_fraction
            if log.clipped_fraction is not None or not fractions
            else sum(fractions) / len(fractions)
        ),
        clipped_elsewhere_share=sum(elsewhere) / len(elsewhere) if any(elsewhere) else None,
    )


def _earlier_skips(log: RunLog) -> int:
    """Returns the skips before a run was resumed: they are counted, and have no incident in its folder."""
    counts = [int(count) for _, count in log.skips.finite()]
    here = sum(incident.action == "skipped" for incident in log.incidents)
    # without the file of incidents, those that were counted while it was logged are of this part
    return max(counts[-1] - (here or counts[-1] - counts[0]), 0) if counts else 0


def _count_of(log: RunLog, series: Series, action: str) -> int | None:
    """Returns the last count that was logged or, without any, that of the incidents."""
    counts = series.finite()
    return int(counts[-1][1]) if counts else sum(i.action == action for i in log.incidents) or None


def _is_of_depth(symptom: RunSymptom) -> bool:
    return symptom.cause == "depth" and not any(text.startswith(CURE) for text in symptom.remedies)


def _next_steps(verdict: RunVerdict) -> list[str]:
    """Returns the remedies of all symptoms, tried ones first; of those that begin alike, the first.

    Ahead of them are those of a network that is too deep, which other weights alone often do not train.
    General remedies of a symptom are omitted where one that is as severe has a known cause.
    """
    symptoms = sorted(verdict.symptoms, key=lambda symptom: (not _is_of_depth(symptom), not symptom.is_tried))
    known = {symptom.severity for symptom in symptoms if _is_explained(symptom)}
    remedies = (
        remedy
        for symptom in symptoms
        if _is_explained(symptom) or symptom.kind not in OF_NETWORKS or symptom.severity not in known
        for remedy in symptom.remedies
    )
    by_start: dict[str, str] = {}
    for remedy in remedies:
        by_start.setdefault(re.split(r"[:,;(]", remedy)[0], remedy)
    return [*by_start.values()]


def _is_explained(symptom: RunSymptom) -> bool:
    return symptom.is_tried or symptom.cause in SYMPTOM_CAUSES


def _missing(run: Run, verdict: RunVerdict) -> list[str]:
    """Returns what a run has not logged; nothing of one that had no finite step, or has incidents alone."""
    notes = []
    log, is_unknown = run.log, verdict.status == "unknown"
    if not log.gradients and not len(log.loss):
        if is_unknown:
            notes.append(f"neither a loss nor a gradient norm was logged; {_MONITOR_LOGS}")
    elif not log.gradients:
        notes.append(
            f"no gradient norms were logged, the verdict rests on {run.loss_tag} alone; {_MONITOR_LOGS}"
        )
    elif not any(g.layers for g in log.gradients):
        notes.append("only the total norm was logged; GradientNormMonitor() logs the norm of each layer")
    if log.gradients and not len(log.loss):
        notes.append("no training loss was logged; add self.log('train_loss', loss)")
    elif is_unknown and verdict.outcome.steps:
        notes.append("for a verdict log more often, Trainer(log_every_n_steps=10), or train for longer")
    return notes
