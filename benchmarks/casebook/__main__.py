"""Runs the casebook, and writes the tables of docs/diagnosis.md.

`python -m benchmarks.casebook` takes about half an hour on one core. Outcomes are kept, and a run that was
stopped continues. In the first two collections, every second program of a group is held out: thresholds and
rules were set on the others. In the third, a part is.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.casebook import (
    failing,
    healthy,
    second_failing,
    second_healthy,
    third_failing,
    third_healthy,
)
from benchmarks.casebook.failing import Pair
from benchmarks.casebook.programs import STEPS, Case
from benchmarks.quiet_trainer import QUIET
from benchmarks.records import add_record, read_records, write_section
from lightning_gradguard import Incident, default_callbacks

PAGE = Path("docs/diagnosis.md")
#: Kinds that a diagnosis publishes, and of which one that is not expected is a wrong name.
COUNTED = (
    *("vanishing_gradient", "exploding_gradient", "stuck_loss", "dead_units", "saturated_units"),
    "weight_stagnation",
)

#: The collections, each in two parts, on the first of which rules were set.
HALVES = ("tuned", "held-out", "second-tuned", "second-held-out", "third-tuned", "third-held-out")


class _Listener(pl.Callback):
    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
        record = {
            "kind": incident.kind,
            "step": incident.step,
            "where": incident.where,
            "cause": incident.cause,
        }
        self.found.append(record)


def run(one: Case, bare: bool, whole: bool = False) -> dict[str, Any]:
    """Runs a case with the default callbacks but `InitializationCheck`; returns its incidents.

    Args:
        one: The case.
        bare: True for the diagnosis and the monitor alone.
        whole: True for all default callbacks.
    """
    pl.seed_everything(0, verbose=False)
    module = one.make()
    listener = _Listener()
    omitted = ("initialization_check", "nan_rollback", "adaptive_gradient_clipping", "learning_rate_backoff")
    nothing: dict[str, Any] = dict.fromkeys(omitted if bare else () if whole else omitted[:1])
    suite = default_callbacks(**nothing)
    error = ""
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        options = {**QUIET, "max_steps": -1, "max_epochs": 1, "default_root_dir": folder, **one.trainer}
        trainer = pl.Trainer(**options, callbacks=[*suite, listener])
        try:
            trainer.fit(module, DataLoader(one.data(STEPS), batch_size=None))  # type: ignore[arg-type]
        except Exception as caught:
            error = repr(caught)
    return {"name": one.name, "incidents": listener.found, "error": error}


def cases() -> list[tuple[str, str, Case]]:
    """Returns all cases with their half, one of `HALVES`, and their group."""
    found: list[tuple[str, str, Case]] = []
    for half, (pairs, healthy_ones) in {
        **_halves("", failing.pairs(), healthy.cases()),
        **_halves("second-", second_failing.pairs(), second_healthy.cases()),
        "third-tuned": (third_failing.pairs(), third_healthy.cases()),
        "third-held-out": (third_failing.held_out_pairs(), third_healthy.held_out_cases()),
    }.items():
        for sick, cured in pairs:
            found += [(half, "failing", sick), (half, "cured", cured)]
        found += [(half, "healthy", one) for one in healthy_ones]
    return found


def _halves(
    prefix: str, pairs: list[Pair], healthy_ones: list[Case]
) -> dict[str, tuple[list[Pair], list[Case]]]:
    return {
        f"{prefix}{half}": (pairs[start::2], healthy_ones[start::2])
        for start, half in enumerate(("tuned", "held-out"))
    }


def table(outcomes: dict[str, dict[str, Any]], wanted: str) -> str:
    """Returns the figures of one half in Markdown."""
    rows: list[str] = []
    misses: list[str] = []
    total = [0] * 6
    delays: list[int] = []
    by_kind: dict[str, list[int]] = defaultdict(lambda: [0, 0], {kind: [0, 0] for kind in COUNTED})
    silent = {"cured": [0, 0], "healthy": [0, 0]}
    for half, group, one in cases():
        if half != wanted or one.name not in outcomes:
            continue
        named = {*COUNTED, *one.kinds}
        is_third = half.startswith("third") and group != "failing"  # where nothing may be published
        found = [i for i in outcomes[one.name]["incidents"] if i["kind"] in named or is_third]
        names = ", ".join(f"{i['kind']} at {i['step']} ({i['cause']})" for i in found) or "nothing"
        if group != "failing":
            silent[group][1] += 1
            silent[group][0] += bool(found)
            misses += [f"* {group}, {one.name}: {names}"] if found else []
            continue
        right = [i for i in found if i["kind"] in one.kinds]
        first = next((kind for kind in COUNTED if kind in one.kinds), min(one.kinds))
        by_kind[first][1] += 1
        by_kind[first][0] += bool(right)
        total[0] += 1
        total[1] += bool(right)
        total[2] += len(right) < len(found)
        if one.where and right:
            total[4] += 1
            places = right[0]["where"][:3]
            is_right = any(p.startswith(w) for p in places for w in one.where)
            total[3] += is_right
            misses += [] if is_right else [f"* {one.name}: layer {places} instead of {one.where}"]
        delays += [right[0]["step"]] if right else []
        if not right or len(right) < len(found):
            misses.append(f"* {one.name} ({first}): {names}")
    rows += [f"| {kind} | {hits} of {n} |" for kind, (hits, n) in by_kind.items()]
    rows += [
        f"| all failing programs | {total[1]} of {total[0]} |",
        f"| programs with a wrong name | {total[2]} of {total[0]} |",
        f"| right layer among the first three, where one is at fault | {total[3]} of {total[4]} |",
        f"| median step of the incident | {median(delays or [0]):.0f} |",
        *(f"| {group} programs with an incident | {n} of {of} |" for group, (n, of) in silent.items()),
    ]
    return "\n".join(["| | |", "|---|---|", *rows, "", "Misses:", "", *(misses or ["none"])])


def main() -> None:
    """Runs what is missing, and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.casebook", description=__doc__)
    parser.add_argument("--kept", type=Path, default=Path("runs/casebook.jsonl"), help="file of the outcomes")
    parser.add_argument("--only", default="", help="run the cases whose name has this in it, and print them")
    parser.add_argument("--bare", action="store_true", help="the diagnosis and the monitor alone")
    parser.add_argument("--half", choices=(*HALVES, "all"), default="all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    outcomes = {record["name"]: record for record in read_records(options.kept)}
    for half, group, one in cases():
        if options.only not in one.name or (not options.only and one.name in outcomes):
            continue
        if options.half not in (half, "all"):
            continue
        outcomes[one.name] = run(one, options.bare, half.startswith(("second", "third")))
        add_record(options.kept, outcomes[one.name])
        print(half, group, json.dumps(outcomes[one.name]), flush=True)
    parts = {half: table(outcomes, half) for half in HALVES}
    for half, part in parts.items():
        print(f"\n{half}\n{part}")
    missing = {half for half, _, one in cases() if one.name not in outcomes}
    if not options.only and PAGE.exists():
        for half, part in parts.items():
            if half not in missing:
                write_section(PAGE, half, part)


if __name__ == "__main__":
    main()
