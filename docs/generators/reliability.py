"""Renders docs/reliability.md from the outcomes of the fault campaign."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from benchmarks.faults.baselines import Answer
from benchmarks.faults.campaign import cases
from benchmarks.faults.classes import FAULTS, TIMES
from benchmarks.faults.runs import Outcome

PAGE = Path(__file__).parents[1] / "reliability.md"
#: Name of the section in the page.
REPORTED = "faults of reported programs"
HEAD = """# Reliability

Outcomes of runs with injected faults. `make faults` repeats all of them on your machine and writes this page;
`python -m benchmarks.faults --part reported` writes the section on faults of reported programs alone.

A run *survives* if it ends by itself, with finite weights, buffers and optimizer state, and has learned:
its score on held-out data is in the better half between the untrained network's and that of the same run
without the fault. It is *equal* if weights, buffers and optimizer state are bit for bit those of a run
without the lost batches; that is not defined under manual optimization with two optimizers (one step of a
batch may be committed), if no batch is lost, and if training absorbs a fault of the state without a
rollback. A *cause* is named if the first incident with a cause has that of the table. *Lost* batches are
those whose update is not in the weights; *recovered after* is the number of batches until the loss is within
half of its value before the fault.

The suite runs without `LearningRateBackoff` here, which changes the following steps by design, and with
`restore_rng=True, rewind_schedulers=True`; see `benchmarks/faults/runs.py`.
"""


def write(
    path: Path,
    single: Sequence[Outcome],
    pairs: Sequence[Outcome],
    baselines: Mapping[str, Sequence[tuple[str, Answer]]],
    quiet: Sequence[tuple[tuple[str, int, str], Mapping[str, int]]],
    recovered: str,
    killed: str,
) -> None:
    """Writes the page.

    Args:
        path: Of the file.
        single: Outcomes with one process.
        pairs: Outcomes with two.
        baselines: By name: the kind of fault and the outcome.
        quiet: Clean runs and their incidents.
        recovered: Table of the runs at high learning rates.
        killed: Summary of the runs after SIGKILL.
    """
    reported_programs = [o for o in single if FAULTS[o.case.kind].is_reported]
    first = [o for o in single if not FAULTS[o.case.kind].is_reported]
    counted = [o for o in first if FAULTS[o.case.kind].survivable]
    hopeless = [o for o in first if not FAULTS[o.case.kind].survivable]
    alarms: Counter[str] = Counter()
    for _, incidents in quiet:
        alarms.update(incidents)
    words = ", ".join(f"{n} {kind}" for kind, n in alarms.items()) or "none"
    parts = [
        HEAD,
        f"Torch {torch.__version__}, Lightning {version('pytorch_lightning')}, "
        f"Python {platform.python_version()}, on {platform.machine()} CPUs.\n",
        "## Classes of faults\n",
        _table(
            ("fault", "what is done", "survivable", "cause to be named"),
            [(k, f.what, "yes" if f.survivable else f"no: {f.why_not}", f.cause) for k, f in FAULTS.items()],
        ),
        _table(("time", "when"), list(TIMES.items())),
        f"## {len(counted)} faults in one process\n",
        _by(counted, "fault", lambda o: o.case.kind),
        "The same runs by time, model, optimizer, precision and `check`:\n",
        *(
            _by(counted, name, key)
            for name, key in (
                ("time", lambda o: o.case.time),
                ("model", lambda o: o.case.model),
                ("optimizer", lambda o: o.case.optimizer),
                ("precision", lambda o: o.case.precision),
                ("check", lambda o: o.case.check),
            )
        ),
        f"Of the faults that are not survivable, {len(hopeless)} were tried: "
        f"{sum(o.survived for o in hopeless)} runs survived, {sum(bool(o.error) for o in hopeless)} ended "
        "with an error that states the reason.\n",
        f"## Faults of reported programs\n\n<!-- {REPORTED} -->\n",
        reported(reported_programs),
        f"<!-- end of {REPORTED} -->\n",
        f"## {len(pairs)} faults on one rank of two\n",
        f"Ranks ended bit for bit alike in {sum(o.ranks_equal for o in pairs)} of {len(pairs)} runs; "
        "no run hung.\n",
        _by(pairs, "fault", lambda o: o.case.kind),
        "## Other tools under the same faults\n",
        "Surviving runs, of those that are possible: SGD, one process, a steady run, float32 (float16 for "
        "its overflow). `gradient_clip_val`, `EarlyStopping` on a logged loss and `SpikeDetection` do not "
        "work under the manual optimization of a GAN, so that these runs are not counted. All are used with "
        "their defaults. `log(0)` and `division by zero` corrupt the value of the loss here, not its "
        "gradient; a run that does not check its loss survives them.\n",
        _baselines(baselines, counted),
        "## False alarms\n",
        f"{len(quiet)} clean runs of 2,000 steps, with noisy data and a warm-up of the learning rate; "
        f"incidents: {words}.\n",
        "## Divergence\n",
        "A 12-layer ReLU network, He initialization, SGD with momentum 0.9, 300 steps; accuracy on held-out "
        "samples, by seed. This is the whole suite with its defaults.\n",
        recovered + "\n",
        "## Kill -9\n",
        killed + "\n",
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def reported(outcomes: Sequence[Outcome]) -> str:
    """Renders the section on the classes that were added after programs of others were rebuilt.

    Args:
        outcomes: Of these classes, with one process; in any number.
    """
    possible = sum(FAULTS[case.kind].is_reported for case in cases())
    return (
        "Classes that were added later, from programs that people have reported; they are not in the tables "
        f"above. {len(outcomes)} of their {possible} combinations were run.\n\n"
        + _by(sorted(outcomes, key=lambda o: list(FAULTS).index(o.case.kind)), "fault", lambda o: o.case.kind)
    )


def _by(outcomes: Sequence[Outcome], name: str, key: Callable[[Outcome], str]) -> str:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(key(outcome), []).append(outcome)
    rows = [(group, *_row(members)) for group, members in groups.items()]
    if len(groups) > 1:
        rows.append(("all", *_row([o for o in outcomes if FAULTS[o.case.kind].survivable])))
    return _table((name, "runs", "survived", "equal", "cause named", "lost", "recovered after"), rows)


def _row(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    recovered = [o.recovered_after for o in outcomes if o.recovered_after is not None]
    return (
        str(len(outcomes)),
        _share([o.survived for o in outcomes if FAULTS[o.case.kind].survivable]) or "not survivable",
        _share([o.equal for o in outcomes if o.equal is not None]),
        _share([o.named for o in outcomes if o.named is not None]),
        f"{median(o.lost for o in outcomes):g} (at most {max(o.lost for o in outcomes)})",
        f"{median(recovered):g} (at most {max(recovered)})" if recovered else "",
    )


def _share(flags: Sequence[bool]) -> str:
    return f"{sum(flags)} of {len(flags)} ({100 * sum(flags) / len(flags):.1f} %)" if flags else ""


def _baselines(baselines: Mapping[str, Sequence[tuple[str, Answer]]], ours: Sequence[Outcome]) -> str:
    kinds = list(dict.fromkeys(kind for answers in baselines.values() for kind, _ in answers))
    rows = []
    for kind in [*kinds, "all"]:
        cells = []
        for answers in baselines.values():
            of_kind = [a for k, a in answers if kind == k or (kind == "all" and k)]
            cells.append(f"{sum(a.survived for a in of_kind)} of {len(of_kind)}" if of_kind else "")
        mine = [o for o in ours if kind in (o.case.kind, "all")]
        cells.append(f"{sum(o.survived for o in mine)} of {len(mine)}" if mine else "see below")
        rows.append((kind or "none, for comparison", *cells))
    return _table(("fault", *baselines, "the suite (all runs)"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "".join("| " + " | ".join(line) + " |\n" for line in cells)
