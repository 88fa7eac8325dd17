"""Renders reports as plain text within the width of the terminal."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Sequence
from itertools import zip_longest

from lightning_gradguard.core.incidents import CURE, label, title
from lightning_gradguard.report.render.wording import (
    LAYERS_TITLE,
    comparison_table,
    intervention_sentences,
    layer_table,
    outcome_sentence,
)
from lightning_gradguard.report.run_report import RunReport

#: Rows of the table of layers.
MAX_LAYERS = 5
#: Next steps for one run, and for each of several.
MAX_STEPS, MAX_STEPS_EACH = 8, 3
#: Smallest width of a shortened column; a table that needs less is printed one value a line.
MIN_WIDTH = 12


def to_text(reports: Sequence[RunReport], width: int) -> str:
    """Returns the full report on one run, or several runs side by side."""
    if len(reports) == 1:
        return "\n".join(_full(reports[0], width))
    lines = text_table(comparison_table(reports), width, flexible=(0, 1, 7))
    for report in reports:
        if report.verdict.symptoms or report.verdict.status != "healthy":
            lines += ["", *_brief(report, width)]
    return "\n".join([*lines, "", *_wrapped("For all details name one folder, or look at --html.", width)])


def text_table(rows: Sequence[Sequence[str]], width: int, flexible: Sequence[int] = (0,)) -> list[str]:
    """Returns aligned columns within a width, or one value a line if they do not fit.

    The head is the first of the rows; texts in flexible columns are wrapped between words, and behind the
    separators of names.

    Example:
        >>> text_table([("run", "loss"), ("a_run_with_a_long_name", "1.2")], width=20)
        ['run            loss', 'a_run_with_a_  1.2', 'long_name']
    """
    columns = [*zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    least = [max(len(word.rstrip()) for cell in column for word in _words(cell)) for column in columns]
    excess = sum(widths) + 2 * (len(widths) - 1) - width
    while excess > 0:
        widest = max(flexible, key=lambda i: (widths[i] > least[i], widths[i]))
        if widths[widest] <= max(least[widest], MIN_WIDTH):
            return _transposed(rows, width)
        widths[widest] -= 1
        excess -= 1
    folded = [[_folded(cell, width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    widths = [max(len(line) for cell in column for line in cell) for column in zip(*folded, strict=True)]
    lines = []
    for cells in folded:
        for parts in zip_longest(*cells, fillvalue=""):
            lines.append("  ".join(map(str.ljust, parts, widths)).rstrip())
    return lines


def _words(text: str) -> list[str]:
    """Splits a text where it may be wrapped: between words, and behind the separators of names."""
    return re.findall(r"[^\s/._]*[\s/._]+|[^\s/._]+", text) or [""]


def _folded(text: str, width: int) -> list[str]:
    """Wraps the text of a cell."""
    lines = [""]
    for word in _words(text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _transposed(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    head, *others = rows
    longest = max(map(len, head))
    return [
        line
        for row in others
        for name, value in zip(head, row, strict=True)
        for line in _wrapped(f"{name:<{longest}}  {value}", width, hanging=longest + 2)
    ]


def _full(report: RunReport, width: int) -> list[str]:
    run, verdict = report.run, report.verdict
    lines = [*_wrapped(f"{run.name}: {verdict.headline}", width)]
    lines += _wrapped(outcome_sentence(report), width, indent=2)
    if verdict.symptoms:
        lines += ["", "Symptoms", *_symptoms(report, width)]
        lines += ["", "Next steps", *_numbered(report.next_steps[:MAX_STEPS], width)]
    if report.timeline:
        lines += ["", "Timeline"]
        longest = max(len(entry.steps) for entry in report.timeline)
        for entry in report.timeline:
            text = f"{entry.steps:<{longest}}  {entry.text}"
            lines += _wrapped(text, width, indent=2, hanging=longest + 4)
    layers = layer_table(report, MAX_LAYERS)
    if layers:
        more = len(report.layers) - MAX_LAYERS
        lines += ["", LAYERS_TITLE + (f" ({more} more)" if more > 0 else "")]
        lines += [f"  {line}" for line in text_table(layers, width - 2)]
    if report.incidents:
        counts = ", ".join(f"{kind} {n}" for kind, n in report.incidents.items())
        lines += ["", "Incidents", *_wrapped(counts, width, indent=2)]
    lines += ["", "Interventions", *_listed(intervention_sentences(report.interventions), width)]
    if run.dossiers:
        pages = [f"step {d.step}, {label(d.cause)}: {run.path / d.path}" for d in run.dossiers]
        lines += ["", "Dossiers", *_listed(pages, width)]
    if report.notes:
        lines += ["", "Notes", *_listed(report.notes, width)]
    return lines


def _brief(report: RunReport, width: int) -> list[str]:
    lines = _wrapped(f"{report.run.name}: {report.verdict.headline}", width)
    lines += _symptoms(report, width)
    if report.verdict.status in ("failed", "unhealthy"):
        lines += _numbered(report.next_steps[:MAX_STEPS_EACH], width)
    interventions = report.interventions
    if interventions.skips is not None or interventions.clipped_share is not None:
        lines += _listed(intervention_sentences(interventions), width)
    return lines + _listed(report.notes, width)


def _symptoms(report: RunReport, width: int) -> list[str]:
    lines = []
    for symptom in report.verdict.symptoms:
        where = f" at {symptom.where[0]}" if symptom.where else ""
        name = f"{title(symptom.kind, symptom.cause)}{where} ({symptom.severity}, from step {symptom.since})"
        lines += _wrapped(name, width, indent=2)
        lines += _wrapped(symptom.evidence, width, indent=4)
    return lines


def _numbered(texts: Iterable[str], width: int) -> list[str]:
    """Numbers texts; code is left in one line at the margin, since it is pasted."""
    lines = []
    for i, text in enumerate(texts, 1):
        words, _, code = text.removeprefix(CURE).rpartition("\n")
        if (words or code != text) and _is_code(code):
            words = words or "Paste at the end of __init__, with model = self:"
            lines += _wrapped(f"{i}. {words}", width, 2, 5)
            lines.append(code)
        else:
            lines += _wrapped(f"{i}. {text}", width, indent=2, hanging=5)
    return lines


def _is_code(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def _listed(texts: Iterable[str], width: int) -> list[str]:
    return [line for text in texts for line in _wrapped(text, width, indent=2, hanging=4)]


def _wrapped(text: str, width: int, indent: int = 0, hanging: int | None = None) -> list[str]:
    after = " " * (indent if hanging is None else hanging)
    return textwrap.wrap(
        " ".join(text.splitlines()),
        max(width, MIN_WIDTH + len(after)),
        initial_indent=" " * indent,
        subsequent_indent=after,
        drop_whitespace=True,
        break_on_hyphens=False,
    )
