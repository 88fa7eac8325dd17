"""The report on a treatment as an HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning_gradguard.report.analysis.run_log import Series
from lightning_gradguard.runtime.logging.html_page import Section, render_page
from lightning_gradguard.treatment.learning import learning_of
from lightning_gradguard.treatment.result import TreatmentResult
from lightning_gradguard.treatment.trials.trial import Trial, name_of


def to_html(result: TreatmentResult, command: str) -> str:
    """Returns the page: the verdict, what ailed the program, what was tried, and what to do."""
    before, after = (f"{n:,}" for n in result.costs["parameters"])
    slow, slower = (f"{1e3 * s:.2g} ms" for s in result.costs["seconds_per_step"])
    sections = [
        Section("Verdict", result.evidence),
        Section("Train with it", "" if command else "No treatment.yaml was written.", command=command),
        Section("Found in the program", items=result.problems),
        *_prescribed(result),
        Section("Changes", rows={c.describe(): result.reason for c in result.changes}),
        Section("Held-out loss", figures=_figures(result)),
        Section("Trials", table=[HEAD, *map(row_of, (result.probe, *result.trials))]),
        Section("Fresh seeds", table=_verification(result)),
        Section(
            "Measured",
            rows={
                "Metric": result.metric,
                "Budget": f"{result.budget:.0f} s, of which {result.spent:.0f} s were spent",
                "Steps": f"{result.steps} optimizer steps for a trial of full length",
                "Seed": str(result.seed),
                "Parameters": before if before == after else f"{before}, with the treatment {after}",
                "Time of a step, in one trial": (
                    f"{slow}, with the treatment {slower}" if result.verification else slow
                ),
            },
        ),
        Section("Notes", items=result.notes),
    ]
    return render_page(result.headline, sections, is_wide=True)


def row_of(trial: Trial) -> tuple[str, ...]:
    """Returns the row of a trial: changes, seed, steps, loss, ratio, parameters, time of a step, remarks."""
    is_known = math.isfinite(trial.over_constant)
    over = trial.over_constant if is_known else trial.over_permuted
    ratio = f"{over:.2f}{'' if is_known else ' (permuted)'}" if math.isfinite(over) else "-"
    logged = ", ".join(f"{name} {value:.4g}" for name, value in list(trial.metrics.items())[:3])
    time = f"{1e3 * trial.seconds_per_step:.3g} ms" if math.isfinite(trial.seconds_per_step) else "-"
    parts = [name_of(trial.job.changes), str(trial.job.seed), str(trial.reached)]
    return (
        *parts,
        "-" if trial.error else trial.loss_in_words,
        ratio,
        f"{trial.parameters:,}",
        time,
        trial.error or logged,
    )


HEAD = ("changes", "seed", "steps", "held-out loss", "over constant", "parameters", "step", "logged")


def _verification(result: TreatmentResult) -> list[tuple[str, ...]]:
    head = ("seed", "untreated", "treated", "evidence")
    rows = [
        (str(r.treated.job.seed), row_of(r.untreated)[3], row_of(r.treated)[3], r.learning.evidence)
        for r in result.verification
    ]
    return [head, *rows] if rows else []


def _prescribed(result: TreatmentResult) -> list[Section]:
    found = []
    for one in result.prescriptions:
        place = f"{one.place}: " if one.place else ""
        found.append(
            Section(f"Prescribed: {one.fault.replace('_', ' ')}", place + one.text, command=one.patch)
        )
    return found


def _figures(result: TreatmentResult) -> dict[str, str]:
    # matplotlib takes longer to import than a command line without charts takes
    from lightning_gradguard.report.render.charts import curves

    mine = [t for t in result.trials if t.job.changes == result.changes and t.curve]
    best = max(mine, key=lambda t: t.curve[-1][0], default=None) if result.is_treated else None
    shown = {"untreated": result.probe, **({} if best is None else {name_of(best.job.changes): best})}
    lines = {name: _series(trial.curve) for name, trial in shown.items()}
    others = [_series(t.curve) for t in result.trials if t.curve and t not in shown.values()]
    figures = {f"{result.metric.capitalize()}; all other trials in grey": curves(lines, others)}
    if best is not None:
        losses = {name: _series(trial.training) for name, trial in shown.items()}
        if any(map(len, losses.values())):  # manual optimization may return no loss
            figures["Loss of the training batches"] = curves(losses, ())
    return figures


def _series(curve: Sequence[tuple[int, float]]) -> Series:
    return Series([step for step, _ in curve], [loss for _, loss in curve])


def text_of(result: TreatmentResult) -> str:
    """Returns a result for the console."""
    lines = [result.headline, f"  {result.evidence}"]
    lines += [f"  found: {problem}" for problem in result.problems[:3]]
    for one in result.prescriptions:
        lines.append(f"  prescribed{f', {one.place}' if one.place else ''}: {one.text}")
    if result.is_treated:
        before, after = result.costs["parameters"]
        if before != after:
            lines.append(f"  {before:,} parameters before, {after:,} with it")
    evidence = learning_of(result.probe).evidence
    lines.append(f"  untreated: {evidence}" if result.verdict != "healthy" else "")
    lines += [f"  note: {note}" for note in result.notes]
    spent = f"{result.spent:.0f} s of {result.budget:.0f} s, {len(result.trials)} trials"
    written = (
        f"{result.folder / 'report.html'}{'' if result.is_treated else '; no treatment.yaml was written'}"
    )
    return "\n".join([*filter(None, lines), f"  {spent}; {written}"])
