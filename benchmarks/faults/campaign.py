"""The fault campaign: faults of every kind, at every time, in every model, and what became of the runs.

`python -m benchmarks.faults` runs all of it and writes `docs/reliability.md`, as `make faults` does. Outcomes
are kept in a file of JSON lines, so that a campaign which was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks import kills, pairs, quiet, report, rescue, rivals
from benchmarks.faults.classes import FAULTS, TIMES
from benchmarks.faults.runs import CHECKS, Case, Outcome, play, quietly
from benchmarks.faults.tasks import MODELS, OPTIMIZERS
from benchmarks.faults.baselines import Answer

#: In what numbers precisions occur: float32 as often as the others together.
PRECISIONS = ("32-true", "bf16-mixed", "32-true", "16-mixed")
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


def compare(processes: int) -> dict[str, list[tuple[str, Answer]]]:
    """What every rival makes of the faults: by its name, the kind of fault and the answer."""
    asked = [(name, case) for name in rivals.RIVALS for case in rivals.cases(name)]
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        answers = pool.starmap(_answer, asked, chunksize=1)
    found: dict[str, list[tuple[str, Answer]]] = {name: [] for name in rivals.RIVALS}
    for (name, case), answer in zip(asked, answers, strict=True):
        found[name].append((case.kind, answer))
    return found


def _answer(name: str, case: Case) -> Answer:
    answer: Answer = quietly(rivals.answer, name, case)
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often every combination comes")
    parser.add_argument("--kept", type=Path, default=Path("runs/faults"), help="folder of the outcomes")
    parser.add_argument("--page", type=Path, default=Path("docs/reliability.md"))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    single = campaign(cases(options.rounds), options.kept / "single.jsonl", options.processes)
    for outcome in single:
        if is_wrong(outcome):
            print(outcome)
    report.write(
        options.page,
        single,
        pairs.main(options.kept / "pairs.jsonl"),
        compare(options.processes),
        quiet.main(options.processes),
        rescue.table(rescue.main(range(3))),
        kills.summary(kills.main()),
    )


def is_wrong(outcome: Outcome) -> bool:
    """Whether an outcome is not as the table of faults promises."""
    lost = FAULTS[outcome.case.kind].survivable and not outcome.survived
    return lost or outcome.equal is False or outcome.named is False or not outcome.ranks_equal


if __name__ == "__main__":
    main()
