"""The fault campaign: faults of every kind, at every time, in every model, and what became of the runs.

`python -m benchmarks.faults` runs all of it and writes `docs/reliability.md`, as `make faults` does. Outcomes
are kept in a file of JSON lines, so that a campaign which was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.fault_classes import FAULTS, TIMES
from benchmarks.fault_runs import Case, Outcome, play
from benchmarks.fault_tasks import MODELS, OPTIMIZERS

#: In what numbers precisions occur: float32 as often as the others together.
PRECISIONS = ("32-true", "bf16-mixed", "32-true", "16-mixed")
CHECKS = ("exact", "deferred")
#: How often every kind meets every time and model, each time with another optimizer, precision and check.
ROUNDS = 3


def cases(rounds: int = ROUNDS) -> Iterator[Case]:
    """Every survivable kind at every time in every model, and those that are not survivable once a model."""
    number = itertools.count()
    for seed in range(rounds):
        for kind, fault in FAULTS.items():
            for model, when in itertools.product(MODELS, TIMES if fault.survivable else ("first step",)):
                fits = fault.model in ("", model)
                if fits and kind != "small flip on one rank" and (fault.survivable or seed == 0):
                    n = next(number)
                    yield Case(
                        kind=kind,
                        time=when,
                        model=model,
                        optimizer=list(OPTIMIZERS)[(n + seed) % len(OPTIMIZERS)],
                        precision=fault.precision or PRECISIONS[(n // 3 + seed) % len(PRECISIONS)],
                        check=CHECKS[(n // 2 + seed) % len(CHECKS)],
                        seed=seed,
                    )


def quietly(act: Callable[..., Any], *arguments: Any) -> Any:
    """The same, with nothing printed: a campaign would fill the screen."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return act(*arguments)


def _play(case: Case) -> Outcome:
    outcome: Outcome = quietly(play, case)
    return outcome


def campaign(wanted: Iterable[Case], kept: Path, processes: int) -> list[Outcome]:
    """Run the cases whose outcomes are not kept yet, several at a time.

    Args:
        wanted: What to run.
        kept: File of outcomes; is appended to.
        processes: How many run at a time.
    """
    done = [Outcome.from_json(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {outcome.case for outcome in done}
    wanted = list(wanted)
    missing = [case for case in wanted if case not in known]
    kept.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with multiprocessing.get_context("fork").Pool(processes) as pool, kept.open("a") as file:
        for n, outcome in enumerate(pool.imap_unordered(_play, missing), 1):
            done.append(outcome)
            file.write(outcome.to_json() + "\n")
            file.flush()
            if n % 50 == 0 or n == len(missing):
                print(f"{n} of {len(missing)} cases, {time.perf_counter() - start:.0f} s", flush=True)
    asked = set(wanted)
    return [outcome for outcome in done if outcome.case in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--kept", type=Path, default=Path("runs/faults/outcomes.jsonl"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    outcomes = campaign(cases(options.rounds), options.kept, options.processes)
    for outcome in outcomes:
        wrong = (FAULTS[outcome.case.kind].survivable and not outcome.survived) or outcome.equal is False
        if wrong or outcome.named is False:
            print(outcome)


if __name__ == "__main__":
    main()
