"""Runs the treatment benchmark, and writes the table of docs/treat.md.

`python -m benchmarks.treatment` takes about an hour on two idle cores. Outcomes are kept, and a run that was
stopped continues. A program fails if its accuracy is below 0.9 of that of its healthy twin, in a run of the
same length; it is cured if with `treatment.yaml`'s callbacks, and a fresh seed, it reaches that.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch

from benchmarks.casebook import failing, second_failing
from benchmarks.quiet_trainer import QUIET
from benchmarks.records import add_record, read_records, write_section
from benchmarks.treatment import third_party, written, written_held_out
from benchmarks.treatment.casebook import Case, case_of
from benchmarks.treatment.programs import STEPS, Data, Network, Spec, specs
from lightning_gradguard import treat

PAGE = Path("docs/treat.md")
#: Share of the twin's score that a program reaches which trains, and seed of the final run.
TRAINS, SEED = 0.9, 1000


def score(case: Case, callbacks: Sequence[Any], seed: int) -> tuple[float, float]:
    """Trains a program in full; returns its score on held-out data, and the seconds of the run."""
    pl.seed_everything(seed, verbose=False)
    module = case.make()
    trainer = pl.Trainer(**QUIET, **case.trainer, max_epochs=-1, callbacks=list(callbacks))
    began = time.monotonic()
    try:
        trainer.fit(module, datamodule=case.data())
        duration = time.monotonic() - began
        return case.score(module), duration
    except Exception:  # a program that ends with one has no score
        return 0.0, time.monotonic() - began


def outcome(case: Case, reference: float, budget: str, processes: int) -> dict[str, Any]:
    """Runs a program whose twin has a score and, if it fails, its treatment."""
    before, seconds = score(case, (), SEED)
    record = {"name": case.name, "reference": reference, "untreated": before, "seconds": seconds}
    folder = tempfile.mkdtemp()
    try:
        result = treat(
            case.make,
            case.data(),
            budget=budget,
            out=folder,
            trainer=case.trainer,
            processes=processes,
            progress=lambda _: None,
        )
    finally:
        shutil.rmtree(folder)
    after, _ = score(case, result.callbacks(), SEED) if result.is_treated else (before, 0.0)
    searched, verified = (
        sum(
            trial.curve[-1][0]
            for trial in result.trials
            if trial.curve and (trial.job.seed == 0) == is_search
        )
        for is_search in (True, False)
    )
    steps = {"probe": result.probe.curve[-1][0], "search": searched, "verification": verified}
    return {
        **record,
        "verdict": result.verdict,
        "changes": [change.as_dict() for change in result.changes],
        "prescribed": [one.fault for one in result.prescriptions],
        "treated": after,
        "over_constant": [round(r.treated.over_constant, 3) for r in result.verification],
        "spent": result.spent,
        "steps": steps,
        "planned": case.trainer["max_steps"],
        "evidence": result.evidence,
    }


def cases(with_casebook: bool, with_at51: bool, with_written: bool) -> Iterator[Case]:
    """Yields the generated programs, and the failing ones of the casebook, of AT-51 and written by hand."""
    for spec in specs():
        yield _case(spec)
    if with_written:
        yield from written.cases(written.PROGRAMS)
        yield from written.cases(written_held_out.PROGRAMS, "written, held out")
    if with_casebook:
        yield from (case_of(one, twin) for one, twin in [*failing.pairs(), *second_failing.pairs()])
    if with_at51:
        yield from third_party.cases()


def _case(spec: Spec) -> Case:
    made = _plain(spec)
    made.twin = _plain(spec.twin)
    return made


def _plain(spec: Spec) -> Case:
    return Case(
        spec.name,
        partial(Network, spec),
        partial(Data, spec.data),
        {"max_steps": STEPS},
        _accuracy(spec.data),
    )


def _accuracy(name: str) -> Any:
    def measured(module: pl.LightningModule) -> float:
        data = Data(name).validation
        module.eval()
        with torch.no_grad():
            found = (module(data.tensors[0]).argmax(1) == data.tensors[1]).float().mean()
        return float(found)

    return measured


def table(outcomes: Sequence[dict[str, Any]]) -> str:
    """Returns the figures in Markdown."""
    fails = [o for o in outcomes if o["untreated"] < TRAINS * o["reference"]]
    healthy = [o for o in outcomes if o not in fails]
    treatable = [o for o in fails if not o["prescribed"]]

    def of(group: Sequence[dict[str, Any]], verdict: str) -> list[dict[str, Any]]:
        return [o for o in group if o["verdict"] == verdict]

    def trains(group: Sequence[dict[str, Any]]) -> int:
        return sum(o["treated"] >= TRAINS * o["reference"] for o in group)

    cured, better = of(treatable, "cured"), of(treatable, "better")
    changed = len(healthy) - len(of(healthy, "healthy")) - len(of(healthy, "no_treatment_found"))
    costly = [o for o in outcomes if o["verdict"] != "healthy"]
    costs = [sum(o["steps"].values()) / o["planned"] for o in costly]
    parts = [
        f"{name} {median([o['steps'][name] / o['planned'] for o in costly] or [0]):.1f}"
        for name in ("probe", "search", "verification")
    ]
    rows = [
        ("programs", f"{len(outcomes)}"),
        ("failing", f"{len(fails)}"),
        ("of these faults of code or data, prescribed", f"{len(fails) - len(treatable)}"),
        ("*cured*, of the treatable", f"{len(cured)} of {len(treatable)}"),
        ("*cured*, and reaches 0.9 of its twin with a fresh seed", f"{trains(cured)} of {len(cured)}"),
        ("*better*", f"{len(better)} of {len(treatable)}"),
        ("treatable that reach 0.9 of their twin", f"{trains([*cured, *better])} of {len(treatable)}"),
        (
            "healthy programs that were changed",
            f"{changed} of {len(healthy)}",
        ),
        ("median steps of a treatment, over those of a run", f"{median(costs or [0]):.1f}"),
        ("of its parts, in the median", ", ".join(parts)),
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def main() -> None:
    """Runs what is missing, and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.treatment", description=__doc__)
    parser.add_argument(
        "--kept", type=Path, default=Path("runs/treatment.jsonl"), help="file of the outcomes"
    )
    parser.add_argument("--only", default="", help="run the programs whose name has this in it")
    parser.add_argument("--first", type=int, default=None, help="run so many of the programs")
    parser.add_argument("--every", type=int, default=1, help="run every so many of them")
    parser.add_argument("--budget", default="2m", help="of each treatment")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--casebook", action="store_true", help="the failing programs of the casebook, too")
    parser.add_argument("--at51", action="store_true", help="AUTOTRAINER's failing networks, too")
    parser.add_argument("--written", action="store_true", help="failing programs written by hand, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    outcomes = {record["name"]: record for record in read_records(options.kept)}
    offered = cases(options.casebook, options.at51, options.written)
    chosen = [one for one in offered if options.only in one.name]
    chosen = chosen[:: options.every][: options.first]
    references: dict[str, float] = {}
    for one in chosen:
        if one.name in outcomes:
            continue
        twin = one.twin.name
        references[twin] = references[twin] if twin in references else score(one.twin, (), SEED)[0]
        outcomes[one.name] = outcome(one, references[twin], options.budget, options.processes)
        add_record(options.kept, outcomes[one.name])
        print(json.dumps(outcomes[one.name]), flush=True)
    text = table([*outcomes.values()])
    print(text)
    if not options.only and PAGE.exists():
        write_section(PAGE, "benchmark", text)


if __name__ == "__main__":
    main()
