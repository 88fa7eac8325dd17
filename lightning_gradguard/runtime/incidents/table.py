"""The table of a run's incidents in Markdown, for loggers that take text."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

from lightning_gradguard.core.incidents import Incident, first_names, label, sentence_case, title

#: Rows with a sentence below the table.
MAX_DETAILS = 5


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
    advised = {title(i.kind, i.cause): i.advice for i in incidents if i.advice}
    return "\n".join(
        [
            describe_counts(counts),
            "",
            "| Step | Incident | Where | Value | Action | Cause |",
            "|---|---|---|---|---|---|",
            *map(_row, rows),
            "",
            *map(_detail, detailed[:MAX_DETAILS]),
            *(f"\n**{sentence_case(name)}**: {advice}" for name, advice in advised.items()),
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
        f"**{sentence_case(title(incident.kind, incident.cause))}**{times}",
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
