"""Sentences and table rows shared by the text and the HTML report."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradguard.core.detectors import describe_clipping
from lightning_gradguard.report.analysis.outcome import Outcome
from lightning_gradguard.report.run_report import Interventions, RunReport

LAYERS_TITLE = "Layers, those of symptoms first, then by largest norm"


def outcome_sentence(report: RunReport) -> str:
    """Returns the end of the run in one line."""
    outcome = report.verdict.outcome
    n_optimizers = len(report.run.log.gradients)
    by_each = f", of {n_optimizers} optimizers each" * (n_optimizers > 1)
    facts = [f"{outcome.steps} steps{by_each}" if outcome.steps else "no steps were logged"]
    if outcome.failed_at is not None:
        facts = [f"failed after {outcome.survived} of {outcome.steps} steps"]
        if outcome.survived is None:
            unlogged = f"the first {outcome.failed_at} of {outcome.steps} steps, which were not logged"
            facts = [f"failed within {unlogged}"]
    elif outcome.was_stopped:
        at = f"at step {max(incident.step for incident in report.run.log.incidents)}"
        facts = [f"stopped after {outcome.steps} steps" if outcome.steps else f"stopped {at}"]
    if outcome.first_loss is not None and outcome.final_loss is not None:
        final = f"{outcome.final_loss:.4g}" if math.isfinite(outcome.final_loss) else "nonfinite"
        facts.append(f"loss {outcome.first_loss:.4g} to {final}")
    if report.largest_norm is not None:
        facts.append(f"largest gradient norm {_largest_norm(report)}")
    return ", ".join(facts)


def intervention_sentences(interventions: Interventions) -> list[str]:
    """Returns the interventions of the suite, one sentence each."""
    sentences = []
    if interventions.skips is not None:
        rollbacks = interventions.rollbacks or 0
        before = interventions.earlier_skips
        earlier = f" ({before} of them before this part of a resumed run)" if before else ""
        sentences.append(
            f"{_count(interventions.skips, 'step')} skipped{earlier}, {_count(rollbacks, 'rollback')}"
        )
    if interventions.lost_batches:
        reasons = ", ".join(f"{n} {reason}" for reason, n in interventions.lost_batches.items())
        total = _count(sum(interventions.lost_batches.values()), "lost batch", "lost batches")
        on = f" on {interventions.ranks} ranks" if interventions.ranks > 1 else ""
        sentences.append(f"{total}{on} ({reasons}): lost_batches.rank*.jsonl")
    if interventions.learning_rate_scale not in (None, 1.0):
        rates = ", ".join(f"{rate:.3g}" for rate in interventions.learning_rates.values())
        final = f"final learning rate {rates}," if rates else "learning rate"
        sentences.append(f"{final} scaled by {interventions.learning_rate_scale:.3g}")
    if interventions.clipped_share:
        clipped = describe_clipping(interventions.clipped_share)
        sentences.append(f"{clipped} by AdaptiveGradientClipping")
    if interventions.clipped_elsewhere_share is not None:
        share = f"{interventions.clipped_elsewhere_share:.0%} of the logged steps clipped"
        sentences.append(f"{share} by the Trainer or the module")
    return sentences or ["none"]


def comparison_table(reports: Sequence[RunReport]) -> list[tuple[str, ...]]:
    """Returns several runs side by side: a head, and a row for each."""
    head = ("run", "verdict", "finite", "final loss", "max norm", "skips", "rollbacks", "worst layer")
    return [head, *map(_row, reports)]


def layer_table(report: RunReport, at_most: int) -> list[tuple[str, ...]]:
    """Returns the first layers of a report: a head, and a row for each."""
    head = ("layer", "median norm", "max norm", "at step", "nonfinite", "update ratio")
    several = len(report.run.log.gradients) > 1
    rows = [
        (
            f"{layer.name} (optimizer {layer.optimizer})" if several else layer.name,
            short_number(layer.median_norm),
            short_number(layer.largest_norm),
            "-" if layer.largest_norm_at is None else str(layer.largest_norm_at),
            str(layer.nonfinite),
            short_number(layer.median_update_ratio),
        )
        for layer in report.layers[:at_most]
    ]
    return [head, *rows] if rows else []


def short_number(value: float | None) -> str:
    """Returns a number for a table.

    Example:
        >>> short_number(12345.678), short_number(float("nan")), short_number(None)
        ('1.23e+04', 'nonfinite', '-')
    """
    return "-" if value is None else f"{value:.3g}" if math.isfinite(value) else "nonfinite"


def _largest_norm(report: RunReport) -> str:
    logged = f"{short_number(report.largest_norm)} at step {report.largest_norm_at}"
    of_all = short_number(_largest_of_all(report))
    is_logged = of_all == short_number(report.largest_norm)
    return logged if is_logged else f"{of_all} (of the logged steps: {logged})"


def _largest_of_all(report: RunReport) -> float | None:
    """Returns the largest norm of all steps or, where only that is known, of the logged ones."""
    return max(report.largest_norm or 0.0, report.run.log.largest_norm or 0.0) or report.largest_norm


def _row(report: RunReport) -> tuple[str, ...]:
    outcome, interventions = report.verdict.outcome, report.interventions
    return (
        report.run.name,
        report.verdict.headline,
        _finite_steps(outcome),
        short_number(outcome.final_loss),
        short_number(_largest_of_all(report)),
        "-" if interventions.skips is None else str(interventions.skips),
        "-" if interventions.rollbacks is None else str(interventions.rollbacks),
        report.worst_layer or "-",
    )


def _finite_steps(outcome: Outcome) -> str:
    if outcome.failed_at is None and outcome.was_stopped:
        return f"{outcome.steps}, stopped"  # of a number of steps that was not logged
    if outcome.survived in (None, outcome.steps):
        return "-" if outcome.survived is None else f"all {outcome.steps}"
    return f"{outcome.survived} of {outcome.steps}"


def _count(n: int, singular: str, plural: str = "") -> str:
    return f"{n} {singular}" if n == 1 else f"{n} {plural or f'{singular}s'}"
