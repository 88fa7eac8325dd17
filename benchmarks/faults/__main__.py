"""Measures the outcomes of training runs with faults, with the suite and with baselines.

`python -m benchmarks.faults` takes about two hours on two cores and writes docs/reliability.md. A part of it
(`--part`) is printed instead; so are the runs whose outcome is not as promised.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.faults import demo_seeds, divergence, false_alarms, kills, pairs
from benchmarks.faults.campaign import ROUNDS, campaign, cases, compare, is_wrong
from benchmarks.faults.classes import FAULTS
from benchmarks.faults.runs import Outcome
from benchmarks.records import write_section
from docs.generators import reliability

SEEDS = range(3)


def one_process(options: argparse.Namespace) -> list[Outcome]:
    """Runs the campaign in single processes."""
    wanted = [case for case in cases(options.rounds) if not options.kinds or case.kind in options.kinds]
    if options.sample is not None:
        wanted = random.Random(0).sample(wanted, min(options.sample, len(wanted)))
    return campaign(wanted, options.kept / "single.jsonl", options.processes)


def reported(options: argparse.Namespace) -> str:
    """Runs the classes of reported programs, writes their section of the page, and renders it."""
    options.kinds = [kind for kind, fault in FAULTS.items() if fault.is_reported]
    section = reliability.reported(one_process(options))
    write_section(options.page, reliability.REPORTED, section.strip())
    return section


def two_processes(options: argparse.Namespace) -> list[Outcome]:
    """Runs the campaign in a group of two processes."""
    return pairs.main(options.kept / "pairs.jsonl")


def wrong(outcomes: list[Outcome]) -> str:
    """Renders the outcomes that are not as promised, one a line."""
    return "\n".join(str(outcome) for outcome in outcomes if is_wrong(outcome)) or "all as promised"


#: Functions that return the printed text of a part.
PARTS: dict[str, Callable[[argparse.Namespace], str]] = {
    "one-process": lambda options: wrong(one_process(options)),
    "reported": reported,
    "two-processes": lambda options: wrong(two_processes(options)),
    "baselines": lambda options: str(compare(options.processes)),
    "false-alarms": lambda options: "\n".join(map(str, false_alarms.main(options.processes))),
    "divergence": lambda _: divergence.table(divergence.main(SEEDS)),
    "kills": lambda _: kills.summary(kills.main()),
    "demo-seeds": lambda _: "as promised" if demo_seeds.is_promised(demo_seeds.main()) else "not as promised",
}


def main() -> None:
    """Runs everything and writes the page, or prints one part."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--part", choices=PARTS)
    parser.add_argument("--kinds", nargs="*", choices=FAULTS, help="only these faults, in one process")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how often every combination is run")
    parser.add_argument("--sample", type=int, help="only this many of them, drawn at random")
    parser.add_argument("--kept", type=Path, default=Path("runs/faults"), help="folder of the outcomes")
    parser.add_argument("--page", type=Path, default=reliability.PAGE)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.part is not None:
        print(PARTS[options.part](options))
        return
    single = one_process(options)
    print(wrong(single))
    reliability.write(
        options.page,
        single,
        two_processes(options),
        compare(options.processes),
        false_alarms.main(options.processes),
        divergence.table(divergence.main(SEEDS)),
        kills.summary(kills.main()),
    )


if __name__ == "__main__":
    main()
