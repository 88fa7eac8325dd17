"""Compares the verdict of the initialization check at step 0 with what trains, and writes docs/zoo.md.

`python -m benchmarks.zoo` takes a few minutes; the truth is that of `python -m benchmarks.zoo.truth`. Bounds
of the check were set on every second network of a family; the others, and whole families, are held out.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.records import add_record, read_records, write_section
from benchmarks.zoo.entries import HELD_OUT_FAMILIES, Entry, entries
from benchmarks.zoo.other_rules import RIVALS, numbers
from benchmarks.zoo.truth import RATES, TRAINS, TRUTH, network_of
from lightning_gradguard.core.initialization import Finding, measure
from lightning_gradguard.core.initialization.criteria import BOUNDS
from lightning_gradguard.core.initialization.propagation import SignalPropagation

PAGE = Path("docs/zoo.md")
PARTS = ("tuning half", "held-out half", "held-out families")
CHECK = "InitializationCheck"
VERDICTS = ("", "warn", "fail")


def score(measured: SignalPropagation | None, findings: Sequence[Finding], scale_free: bool) -> float:
    """Returns the largest number in units of the bound of a warning, above those of a lesser verdict."""
    found = [0.0]
    bounds = BOUNDS[scale_free]
    if measured is not None and measured.block_gain is not None:
        side = bounds.vanishing if measured.block_gain < 0 else bounds.exploding
        found.append(measured.block_gain / side[0])
    if measured is not None:
        for name, gain in measured.recurrent_gains.items():
            of_loss = max(gain, measured.recurrent_losses.get(name, gain)) if gain < 0 else -gain
            found.append(of_loss / bounds.through_time[0])
        if measured.n_classes is not None and math.isfinite(measured.loss):
            found.append(math.log(measured.loss / math.log(measured.n_classes)) / math.log(bounds.loss[0]))
    return 100.0 * VERDICTS.index(verdict(findings)) + min(max(found), 99.0)


def verdict(findings: Sequence[Finding]) -> str:
    """Returns the worst severity, if it is a failure or a warning."""
    severities = {finding.severity for finding in findings}
    return next((s for s in ("fail", "warn") if s in severities), "")


def judged(entry: Entry) -> dict[str, Any]:
    """Returns verdict and score of the check under each optimizer, and the scores of other rules."""
    network = network_of(entry)
    (x, y), *_ = entry.data(1, 64, torch.Generator().manual_seed(5))
    record: dict[str, Any] = {"name": entry.name}
    for optimizer in RATES:
        is_free = optimizer == "Adam"
        findings, measured = measure(
            network, lambda: functional.cross_entropy(network(x), y), scale_free=is_free
        )
        record[optimizer] = {"verdict": verdict(findings), CHECK: score(measured, findings, is_free)}
    seen = numbers(network, x, y)
    return {**record, "rivals": {name: rule(seen) for name, rule in RIVALS.items()}}


def area(pairs: Sequence[tuple[float, bool]]) -> float:
    """Returns the area under the curve of a score; the chance that a failing network has the higher one."""
    bad, good = ([s for s, fails in pairs if fails is kind] for kind in (True, False))
    wins = sum((b > g) + 0.5 * (b == g) for b in bad for g in good)
    return wins / (len(bad) * len(good)) if bad and good else math.nan


def parts() -> dict[str, str]:
    """Returns the part of each entry by name."""
    seen: Counter[str] = Counter()
    found = {}
    for entry in entries():
        seen[entry.family] += 1
        half = PARTS[seen[entry.family] % 2 == 0]
        found[entry.name] = PARTS[2] if entry.family in HELD_OUT_FAMILIES else half
    return found


def tables(records: Sequence[dict[str, Any]], truth: dict[tuple[str, str], bool]) -> str:
    """Returns the areas and the verdicts in Markdown."""
    part_of = parts()
    lines = ["| area under the curve | " + " | ".join(f"{o}, {p}" for o in RATES for p in PARTS) + " |"]
    lines.append("|---|" + "---|" * 6)
    columns = [
        (o, [r for r in records if part_of[r["name"]] == p and (r["name"], o) in truth])
        for o in RATES
        for p in PARTS
    ]
    sizes = (f"{sum(truth[r['name'], o] for r in rs)} of {len(rs)}" for o, rs in columns)
    lines.append("| networks that fail to train | " + " | ".join(sizes) + " |")

    def row(title: str, value: Callable[[dict[str, Any], str], float]) -> str:
        areas = (area([(value(r, o), truth[r["name"], o]) for r in rs]) for o, rs in columns)
        return f"| {title} | " + " | ".join(f"{a:.2f}" for a in areas) + " |"

    lines.append(row(f"**{CHECK}**", lambda r, o: float(r[o][CHECK])))
    for name in RIVALS:
        lines.append(row(name, lambda r, o, name=name: float(r["rivals"][name])))  # type: ignore[misc]
    head = "| rule, at its own threshold | " + " | ".join(f"{o}, {p}" for o in RATES for p in PARTS) + " |"
    lines += ["", head, "|---|" + "---|" * 6]

    def counts(title: str, fires: Callable[[dict[str, Any], str], bool]) -> str:
        cells = []
        for o, rs in columns:
            hits = Counter(truth[r["name"], o] for r in rs if fires(r, o))
            bad = sum(truth[r["name"], o] for r in rs)
            cells.append(f"{hits[True]} of {bad}; {hits[False]} of {len(rs) - bad}")
        return f"| {title} | " + " | ".join(cells) + " |"

    lines.append(counts(f"**{CHECK}, FAIL**", lambda r, o: r[o]["verdict"] == "fail"))
    lines.append(counts(f"**{CHECK}, FAIL or WARN**", lambda r, o: r[o]["verdict"] != ""))
    for name in RIVALS:
        lines.append(counts(name, lambda r, o, name=name: r["rivals"][name] >= 1))  # type: ignore[misc]
    return "\n".join(lines)


def by_family(records: Sequence[dict[str, Any]], truth: dict[tuple[str, str], bool]) -> str:
    """Returns the verdicts by family in Markdown."""
    family_of = {entry.name: entry.family for entry in entries()}
    found: dict[str, Counter[tuple[str, str, bool]]] = defaultdict(Counter)
    for r in records:
        for o in RATES:
            if (r["name"], o) in truth:
                found[family_of[r["name"]]][o, r[o]["verdict"], truth[r["name"], o]] += 1
    titles = [f"{o}: {what}" for o in RATES for what in ("FAIL", "WARN", "nothing")]
    lines = [f"| fail to train, by verdict | {' | '.join(titles)} |", "|---|" + "---|" * 6]
    for family, counts in found.items():
        cells = [
            f"{counts[o, v, True]} of {counts[o, v, True] + counts[o, v, False]}"
            for o in RATES
            for v in ("fail", "warn", "")
        ]
        lines.append(f"| {family} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Judges every network whose truth is known, and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo", description=__doc__)
    parser.add_argument("--verdicts", type=Path, help="file in which verdicts are kept, and found again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    truth = {(r["name"], r["optimizer"]): max(r["accuracy"].values()) < TRAINS for r in read_records(TRUTH)}
    names = {name for name, _ in truth}
    kept = options.verdicts
    known = read_records(kept) if kept is not None else []
    records = [r for r in known if r["name"] in names]
    done = {r["name"] for r in records}
    for entry in entries():
        if entry.name in names - done:
            records.append(judged(entry))
            if kept is not None:
                add_record(kept, records[-1])
    made = f"{len(records)} networks.\n\n{tables(records, truth)}\n\n{by_family(records, truth)}"
    print(made)
    if PAGE.exists():
        write_section(PAGE, "zoo", made)


if __name__ == "__main__":
    main()
