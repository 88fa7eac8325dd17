"""Runs faults of every kind, at every time, in every model, and keeps the outcomes.

Outcomes are kept in a file of JSON lines, so that an interrupted campaign continues where it stopped.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.faults import baselines
from benchmarks.faults.baselines import Answer
from benchmarks.faults.classes import FAULTS, TIMES
from benchmarks.faults.runs import CHECKS, Case, Outcome, play, quietly
from benchmarks.faults.tasks import MODELS, OPTIMIZERS

#: Precisions in turn: float32 as often as the others together.
PRECISIONS = ("32-true", "bf16-mixed", "32-true", "16-mixed")
#: Runs of every kind at every time in every model, each with another optimizer, precision and check.
ROUNDS = 3


def cases(rounds: int = ROUNDS) -> Iterator[Case]:
    """Every survivable kind at every time in every model, and those that are not survivable once a model."""
    number = itertools.count()
    # later classes last: cases of the others stay the same
    for is_reported, seed in itertools.product((False, True), range(rounds)):
        for kind, fault in FAULTS.items():
            if fault.is_reported is not is_reported:
                continue
            for model, when in itertools.product(MODELS, TIMES if fault.survivable else ("first step",)):
                fits = fault.model in ("", model) and not (fault.is_automatic and model == "GAN")
                if fits and kind != "small flip on one rank" and (fault.survivable or seed == 0):
                    n = next(number)
                    yield Case(
                        kind=kind,
                        time=when,
                        model=model,
                        optimizer=fault.optimizer or list(OPTIMIZERS)[(n + seed) % len(OPTIMIZERS)],
                        precision=fault.precision or PRECISIONS[(n // 3 + seed) % len(PRECISIONS)],
                        check=CHECKS[(n // 2 + seed) % len(CHECKS)],
                        seed=seed,
                    )


def _play(case: Case) -> Outcome:
    outcome: Outcome = quietly(play, case)
    return outcome


def campaign(wanted: Iterable[Case], kept: Path, processes: int) -> list[Outcome]:
    """Runs the cases whose outcomes are not kept yet, several at a time.

    Args:
        wanted: The cases.
        kept: File of outcomes; is appended to.
        processes: Number of processes.
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
    requested = set(wanted)
    return [outcome for outcome in done if outcome.case in requested]


def compare(processes: int) -> dict[str, list[tuple[str, Answer]]]:
    """Runs the faults with every baseline; returns, by its name, kinds of faults and answers."""
    requested = [(name, case) for name in baselines.BASELINES for case in baselines.cases(name)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        answers = pool.starmap(_answer, requested, chunksize=1)
    found: dict[str, list[tuple[str, Answer]]] = {name: [] for name in baselines.BASELINES}
    for (name, case), answer in zip(requested, answers, strict=True):
        found[name].append((case.kind, answer))
    return found


def _answer(name: str, case: Case) -> Answer:
    answer: Answer = quietly(baselines.answer, name, case)
    return answer


def is_wrong(outcome: Outcome) -> bool:
    """True if an outcome is not as the table of faults promises."""
    lost = FAULTS[outcome.case.kind].survivable and not outcome.survived
    return lost or outcome.equal is False or outcome.named is False or not outcome.ranks_equal
