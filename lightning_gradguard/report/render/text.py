"""A report as a terminal shows it: plain text, no wider than the window."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from lightning_gradguard.core.incidents import label, title
from lightning_gradguard.report.run_report import (
    RunReport,
    compared,
    layer_table,
    outcome_in_words,
    span,
    things_to_do,
)

#: Rows of the table of layers.
LAYERS = 5
#: Remedies named for a run among several, and lines of all for one.
FEW_REMEDIES, REMEDIES = 3, 8
#: Letters that a shortened name keeps; a table that needs narrower columns is turned around.
LEAST_LETTERS = 12


def as_text(reports: Sequence[RunReport], width: int) -> str:
    """The whole report: everything on one run, or several side by side.

    Args:
        reports: On the runs.
        width: Of the window.
    """
    if len(reports) == 1:
        return "\n".join(_everything(reports[0], width))
    lines = table(compared(reports), width, flexible=(0, 1, 7))
    for report in reports:
        if report.verdict.symptoms or report.verdict.status != "healthy":
            lines += ["", *_briefly(report, width)]
    return "\n".join([*lines, "", *_wrapped("Name one folder, or add --html FILE, for all of it.", width)])


def table(rows: Sequence[Sequence[str]], width: int, flexible: Sequence[int] = (0,)) -> list[str]:
    """Columns that fit the window, or one value a line where they cannot.

    Args:
        rows: The head first.
        width: Of the window.
        flexible: Columns whose texts may be shortened.

    Example:
        >>> table([("run", "loss"), ("a_run_with_a_long_name", "1.2")], width=20)
        ['run             loss', 'a_run_…ng_name  1.2']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    while excess > 0:
        widest = max(flexible, key=lambda i: widths[i])
        if widths[widest] <= LEAST_LETTERS:
            return _turned(rows, width)
        widths[widest] -= 1
        excess -= 1
    lines = []
    for row in rows:
        cells = [_shortened(cell, width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(map(str.ljust, cells, widths)).rstrip())
    return lines


def _turned(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    head, *others = rows
    longest = max(map(len, head))
    return [
        line
        for row in others
        for name, value in zip(head, row, strict=True)
        for line in _wrapped(f"{name:<{longest}}  {value}", width, hanging=longest + 2)
    ]


def _everything(report: RunReport, width: int) -> list[str]:
    run, verdict = report.run, report.verdict
    lines = [*_wrapped(f"{run.name}: {verdict.headline}", width)]
    lines += _wrapped(outcome_in_words(report), width, indent=2)
    if verdict.symptoms:
        worth = verdict.status in ("healthy", "unknown")
        lines += ["", "Worth knowing" if worth else "What went wrong", *_symptoms(report, width)]
        todo = things_to_do(report)[:REMEDIES]
        lines += ["", "What to do", *_numbered(todo, width)]
    if report.timeline:
        lines += ["", "Timeline"]
        longest = max(len(span(entry)) for entry in report.timeline)
        for entry in report.timeline:
            text = f"{span(entry):<{longest}}  {entry.text}"
            lines += _wrapped(text, width, indent=2, hanging=longest + 4)
    layers = layer_table(report, LAYERS)
    if layers:
        more = len(report.layers) - LAYERS
        lines += ["", "Layers, the worst first" + (f" ({more} more)" if more > 0 else "")]
        lines += [f"  {line}" for line in table(layers, width - 2)]
    if report.incidents:
        counts = ", ".join(f"{kind} {n}" for kind, n in report.incidents.items())
        lines += ["", "Incidents", *_wrapped(counts, width, indent=2)]
    lines += ["", "What was done", *_listed(report.done.sentences(), width)]
    if run.dossiers:
        told = [f"step {d.step}, {label(d.cause)}: {run.path / d.path}" for d in run.dossiers]
        lines += ["", "Dossiers", *_listed(told, width)]
    if report.notes:
        lines += ["", "Notes", *_listed(report.notes, width)]
    return lines


def _briefly(report: RunReport, width: int) -> list[str]:
    lines = _wrapped(f"{report.run.name}: {report.verdict.headline}", width)
    lines += _symptoms(report, width)
    if report.verdict.status in ("dead", "sick"):
        lines += _numbered(things_to_do(report)[:FEW_REMEDIES], width)
    done = report.done
    if done.skips is not None or done.clipped_share is not None:
        lines += _listed(done.sentences(), width)
    return lines + _listed(report.notes, width)


def _symptoms(report: RunReport, width: int) -> list[str]:
    lines = []
    for symptom in report.verdict.symptoms:
        where = f" at {symptom.where[0]}" if symptom.where else ""
        name = f"{title(symptom.kind)}{where} ({symptom.severity}, from step {symptom.since})"
        lines += _wrapped(name, width, indent=2)
        lines += _wrapped(symptom.evidence, width, indent=4)
    return lines


def _numbered(texts: Iterable[str], width: int) -> list[str]:
    return [
        line
        for i, text in enumerate(texts, 1)
        for line in _wrapped(f"{i}. {text}", width, indent=2, hanging=5)
    ]


def _listed(texts: Iterable[str], width: int) -> list[str]:
    return [line for text in texts for line in _wrapped(text, width, indent=2, hanging=4)]


def _wrapped(text: str, width: int, indent: int = 0, hanging: int | None = None) -> list[str]:
    after = " " * (indent if hanging is None else hanging)
    return textwrap.wrap(
        " ".join(text.splitlines()),
        max(width, LEAST_LETTERS + len(after)),
        initial_indent=" " * indent,
        subsequent_indent=after,
        drop_whitespace=True,
        break_on_hyphens=False,
    )


def _shortened(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    # of words the first matter, of a name both ends
    half = width - 1 if " " in text else width // 2 - 1
    return f"{text[:half]}…{text[len(text) - (width - 1 - half) :]}"
