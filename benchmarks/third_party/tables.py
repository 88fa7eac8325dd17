"""Renders the records as docs/evidence_third_party.md."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.third_party.runs import CASES, Record, severity

PAGE = Path(__file__).parents[2] / "docs" / "evidence_third_party.md"
#: Score without the suite from which on a faulty program trains nevertheless.
TRAINS = {"at51": 0.6, "twins": 0.95, "regression": 0.5}
TITLES = {"at51": "AT-51", "twins": "StackOverflow twins", "regression": "Regression network"}

HEAD = """# Programs of others

Failing and healthy programs of published benchmarks, rebuilt from the facts that are public: incidents of
the suite with its defaults, and what it changes. `make third-party` writes this page; records are in
`benchmarks/third_party/records.jsonl`. One seed each. Data comes from scikit-learn or from formulas of
the kind and scale of the original; the digits of scikit-learn stand for MNIST. AT-51 runs the 300 epochs of
the archive, with which three of its failing programs train here. The repaired twin 48221692 does not train
reliably: with seeds 0 to 2 it ends at .265, .145 and .021 without the suite, and at .790, .850 (with an
`exploding_gradient` at step 10) and .021 with it.

*Named* is a faulty program with an incident of a kind that names its fault; the kinds are in the sources
(`benchmarks/third_party/`). A false alarm is a program that trains with any incident, by the most severe one:
*advice* before step 1, a *warning*, or an *intervention*. *Harm* is the score with the suite minus the score
without, on programs that train: negative is worse. Faults of the regression network that do no harm are
counted with the programs that train; an incident that names one is no false alarm.
"""

PUBLISHED = """## Published figures

Of the tools' own result files and papers, on the originals of these programs.

| tool | AT-51: named of 31 | false alarms on the archive that AT-51 is from | faulty programs of threads |
|---|---|---|---|
| DeepDiagnosis | 30 | 68 of 188 (36 %) | 46 of 53 detected, 38 with the right symptom |
| DeepLocalize | 29 | 133 of 186 (72 %) | 45 of 53 detected, 23 with the right symptom |
| UMLAUT | – | every normal program of MNIST and CIFAR-10 | 26 of 53, 17 with the right symptom |
| AUTOTRAINER | 31: its verdict is the label | 0 by definition | 24 of 53, 19 with the right symptom |
| DeepFD | – | – | 47 of 52 detected, 27 with the right category |
| DEFault | – | – | 48 of 52 detected, 33 with the right category |

Their thread programs are more than the ones here, and are faulty ones only: nothing is known of false alarms
there. The two first columns are not measured alike: the archive is larger than AT-51.
"""


def named(record: Record) -> list[dict[str, Any]]:
    """Returns the incidents of a faulty program that name its fault."""
    kinds = CASES[record.benchmark, record.name].kinds
    return [incident for incident in record.incidents if incident["kind"] in kinds]


def worst(record: Record) -> str:
    """Returns the highest severity of the incidents that name no fault of the program; empty without one."""
    kinds = CASES[record.benchmark, record.name].kinds
    found = {severity(incident) for incident in record.incidents if incident["kind"] not in kinds}
    return next((one for one in ("intervention", "warning", "advice") if one in found), "")


def trains(record: Record) -> bool:
    """True if the program reaches a usual score without the suite."""
    return record.bare is not None and record.bare >= TRAINS[record.benchmark]


def is_faulty(record: Record) -> bool:
    """True if the program has a fault; of the regression network, one that hurts."""
    has_fault = bool(CASES[record.benchmark, record.name].kinds)
    return has_fault and not (record.benchmark == "regression" and trains(record))


def page(records: Iterable[Record], environment: Mapping[str, str]) -> str:
    """Returns the page as Markdown."""
    ordered = sorted(records, key=lambda r: (list(CASES).index((r.benchmark, r.name)), r.seed))
    where = ", ".join(f"{name} {version}" for name, version in environment.items())
    parts = [HEAD, f"Measured with {where}.\n", _summary(ordered), PUBLISHED]
    parts += [f"## {TITLES[name]}\n\n{_programs(ordered, name)}" for name in TITLES]
    return "\n".join(parts)


def _summary(records: Sequence[Record]) -> str:
    rows = [
        "| benchmark | named | an incident of any kind | median step | false alarms "
        "| advice, warning, intervention | mean harm | worst harm |",
        "|---" * 8 + "|",
    ]
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.benchmark].append(record)
    for name, found in groups.items():
        faulty, healthy = [r for r in found if is_faulty(r)], [r for r in found if not is_faulty(r)]
        hits = [r for r in faulty if named(r)]
        steps = [min(i["step"] for i in named(r)) for r in hits]
        alarms = Counter(worst(r) for r in healthy)
        counts = ", ".join(str(alarms[one]) for one in ("advice", "warning", "intervention"))
        harms = [r.suite - r.bare for r in healthy if r.suite is not None and r.bare is not None]
        lost = sum(r.suite is None and r.bare is not None for r in healthy)
        rows.append(
            f"| {TITLES[name]} | {len(hits)} of {len(faulty)} | {sum(bool(r.incidents) for r in faulty)} "
            f"| {median(steps or [0]):.0f} | {len(healthy) - alarms['']} of {len(healthy)} | {counts} "
            f"| {sum(harms) / max(len(harms), 1):+.3f} | {min(harms, default=0):+.3f}"
            f"{f' ({lost} nonfinite)' if lost else ''} |"
        )
    return "\n".join(rows) + "\n"


def _programs(records: Sequence[Record], benchmark: str) -> str:
    rows = ["| program | | without | with | named | incidents: kind at step (cause) |", "|---" * 6 + "|"]
    for record in records:
        if record.benchmark != benchmark:
            continue
        case = CASES[record.benchmark, record.name]
        if is_faulty(record):
            mark = "yes" if named(record) else "**no**"
            mark += ", trains" if trains(record) else ""
        else:
            mark = "**false alarm**" if worst(record) else "yes, trains" if record.incidents else ""
        scores = [f"{one:.3g}" if one is not None else "nonfinite" for one in (record.bare, record.suite)]
        seen = list(dict.fromkeys(map(_in_words, record.incidents)))
        listed = ", ".join([*seen[:4], *([f"{len(seen) - 4} more"] if len(seen) > 4 else [])])
        rows.append(f"| {record.name} | {case.title} | {' | '.join(scores)} | {mark} | {listed} |")
    return "\n".join(rows) + "\n"


def _in_words(incident: Mapping[str, Any]) -> str:
    cause = f" ({incident['cause']})" if incident["cause"] else ""
    return f"`{incident['kind']}` at {incident['step']}{cause}"
