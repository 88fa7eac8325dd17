"""Renders docs/performance.md from measurements of the cost."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.cost import bars, timings
from benchmarks.cost.bars import Bar
from benchmarks.cost.counts import TENSORS, Count, Kind
from benchmarks.cost.interleaved import SNAPSHOT_EVERY, is_hot, is_logged
from benchmarks.cost.memory import LOOK_EVERY, Look
from benchmarks.cost.networks import ELEMENTS, LARGE
from benchmarks.cost.peers import BARE, EXACT, LOG_EVERY, VARIANTS
from benchmarks.cost.timings import DEEPCOPY, KEPT, NEVER, WARM_UP, Spread, Timed
from lightning_gradguard.core.norms import CHUNK

PAGE = Path(__file__).parents[1] / "performance.md"
HEAD = """# What the suite costs

Counted and timed; this page is written by `make bench`, which does all of it again on your machine. Nothing
below was typed by hand but the sentences around the tables.

All five callbacks with their defaults are *the suite*, which waits for the device once a step;
*deferred* is the same with `NaNRollback(check="deferred")`, which never waits. Clipping has its threshold
after three steps here, as ZClip has, so that what it costs after its warm-up is what is measured. A *hot*
step is one that is not logged, nearly all of them. Every fit is a real `Trainer.fit` with fused AdamW, than
which no optimizer steps faster, so that what is added to it weighs as much as it can.

A bar is *open* where quartiles lie on both sides of it: then the noise is larger than the difference, and
nothing is claimed. Times are worth something on an idle machine only: on a busy one every step waits, and
what is added to it seems small.
"""


@dataclass
class Found:
    """Everything that was counted and timed; empty where it was not.

    Args:
        load: How busy the machine was before: processes that wanted to run.
        counts: What is added to a step.
        whole: Steps by network.
        prepared: Steps of hooks and optimizer, by network.
        kept: Steps at which something is kept, by network.
        peaks: Most memory in MB, by variant.
        long_runs: By variant.
    """

    load: float
    counts: list[Count] = field(default_factory=list)
    whole: dict[str, Timed] = field(default_factory=dict)
    prepared: dict[str, Timed] = field(default_factory=dict)
    kept: dict[str, Timed] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    long_runs: dict[str, list[Look]] = field(default_factory=dict)


def page(found: Found) -> str:
    """The whole page, or the parts of it of which something was found."""
    parts = [
        HEAD,
        f"{torch.get_num_threads()} cores of an {platform.machine()} CPU, torch {torch.__version__}, "
        f"Lightning {version('pytorch_lightning')}, Python {platform.python_version()}; "
        f"{found.load:.1f} processes wanted to run before it began. No GPU was used: waits and launches are "
        "counts, not times.\n",
    ]
    sections = (
        (found.counts, _counts),
        (found.whole, _whole),
        (found.prepared, _prepared),
        (found.kept and found.whole, _kept),
        (found.peaks, _peaks),
        (found.long_runs, _long_run),
    )
    for measured, section in sections:
        if measured:
            parts += section(found)
    return "\n".join(parts)


def _counts(found: Found) -> list[str]:
    return [
        "## Counted\n",
        f"What is added to a bare step, with {_listed(TENSORS)} tensors of {ELEMENTS:,} elements each. On a "
        f"CPU the suite measures a tensor of more than {CHUNK:,} by rows, for accuracy, which takes an "
        "operation for each such tensor; that is not in these numbers. "
        "Operations are calls of torch's dispatcher without views; waits are those of the host for the "
        "device, which on a CPU cost nothing and are counted all the same; launches are a model of what CUDA "
        "would start; bytes are in those of all gradients, and are those that operations take and leave, the "
        "optimizer's own taken off; where gradients are few bytes, a handful of numbers shows beside them. "
        "A deferred step reads on the host what was sent there a step before "
        "(*late*): it waits for nothing that was asked of the device since, as "
        "`tests/contracts/test_host_synchronizations.py` holds for a GPU. Rows that do not say so are with "
        "fused AdamW.\n",
        "A hot step:\n",
        _count_table(found.counts, "hot"),
        "A logged step:\n",
        _count_table(found.counts, "logged"),
        _bar_table(bars.of_counts(found.counts)),
    ]


def _whole(found: Found) -> list[str]:
    parts = [
        "## Whole steps\n",
        "Each variant is a fit of its own, with its own network; all take their steps in turn in one "
        f"process, in an order drawn anew in each round, after {WARM_UP} rounds that do not count. A step "
        "lasts from being handed a batch to asking for the next. Ratios and differences are those to the "
        "bare step of the same round, medians with quartiles. *bare, again* is the same as bare: differences "
        f"as small as its own are noise. Every {LOG_EVERY}th step is logged; those around "
        f"the suite's snapshots, every {SNAPSHOT_EVERY}, are left out here. A turn of the BoringModel is "
        f"{timings.IN_A_ROW} steps, after {timings.SETTLE} that do not count: its steps are all overhead, "
        "and caches should be those of one fit. Tensors above 65,536 elements add one operation each on a "
        "CPU; small ones of one shape are copied there before they are measured, and so read twice.\n",
        _table(
            ("variant", "offers", "from"), [(n, v.offers, v.source) for n, v in VARIANTS.items() if n != BARE]
        ),
    ]
    for network, timed in found.whole.items():
        hot, logged = (sum(map(wanted, timed[BARE])) for wanted in (is_hot, is_logged))
        parts += [
            f"### {network}\n",
            f"A bare step takes {timings.typical(timed[BARE]):.3g} ms. {hot} rounds of hot steps, {logged} "
            f"of logged ones{'' if network in LARGE else '; one thread'}.\n",
            _time_table(timed),
        ]
        if network not in LARGE:
            parts.append(_bar_table(bars.of_boring(timed)))
    return parts


def _prepared(found: Found) -> list[str]:
    parts = [
        "## Hooks and optimizer alone\n",
        "In a step of 300 ms a few are lost in the noise. Here the same parameters get gradients that were "
        "prepared, written anew in each step, so that Lightning, its hooks and the optimizer are all there "
        "is to a step. Ratios are to that; they are not those of training.\n",
    ]
    for network, timed in found.prepared.items():
        parts += [
            f"### {network}, prepared gradients\n",
            f"A bare step takes {timings.typical(timed[BARE]):.3g} ms.\n",
            _time_table(timed),
        ]
    return [*parts, _bar_table(bars.of_hot_steps(found.whole, found.prepared))]


def _kept(found: Found) -> list[str]:
    rows = []
    for network, timed in found.kept.items():
        step = timings.typical(found.whole[network][BARE])
        for name, base in ((KEPT, NEVER), (DEEPCOPY, BARE)):
            cost = timings.added(timed, name, timings.is_kept, to=base)
            shown = "the suite" if name == KEPT else name
            rows.append((network, shown, _spread(cost), f"{cost.middle / SNAPSHOT_EVERY / step:.2%}"))
    return [
        "## Snapshots\n",
        "What it takes to keep weights and optimizer state in memory, so that training can go back. Steps of "
        "the suite with a snapshot against the same ones of a suite that takes none; steps with a "
        "`copy.deepcopy` of the state dicts against bare ones; without a backward pass, as above. Shares are "
        f"of a whole bare step, for one every {SNAPSHOT_EVERY}.\n",
        _table(("network", "by", "ms", "of a step"), rows),
        _bar_table(bars.of_snapshots(found.whole, found.kept)),
    ]


def _peaks(found: Found) -> list[str]:
    bare = found.peaks[BARE]
    rows = [(name, f"{most:,.0f}", f"{most - bare:+,.0f}") for name, most in found.peaks.items()]
    return [
        "## Memory\n",
        "The most memory of a process that trains the GPT for five steps, in MB, with the first snapshot. "
        "Each further one, up to `keep_snapshots + 1`, takes as much again as weights and optimizer state.\n",
        _table(("variant", "MB", "beside bare"), rows),
    ]


def _long_run(found: Found) -> list[str]:
    rows = [
        (
            name,
            *(
                f"{first} {unit}, then {last} {unit}"
                for first, last, unit in (
                    (f"{looks[0].milliseconds:.2f}", f"{looks[-1].milliseconds:.2f}", "ms"),
                    (f"{looks[0].mean:.2f}", f"{looks[-1].mean:.2f}", "ms"),
                    (f"{looks[1].megabytes:,.0f}", f"{looks[-1].megabytes:,.0f}", "MB"),
                )
            ),
        )
        for name, looks in found.long_runs.items()
    ]
    steps = len(found.long_runs[BARE]) * LOOK_EVERY
    return [
        f"## {steps:,} steps\n",
        "The BoringModel, on one thread, logged every 50 steps: its first thousand and its last. The "
        "mean is with logging and snapshots; memory is the most so far, by the end of the second thousand "
        "(the first ends with the first heat map, for which matplotlib is loaded) and of the last.\n",
        _table(("variant", "median step", "mean step", "memory"), rows),
        _bar_table(bars.of_long_run(found.long_runs[BARE], found.long_runs[EXACT])),
    ]


def _count_table(counts: Sequence[Count], kind: Kind) -> str:
    groups: dict[tuple[str, bool], list[Count]] = {}
    for count in counts:
        if count.kind == kind:
            groups.setdefault((count.variant, count.fused), []).append(count)

    def cell(members: Sequence[Count], show: Callable[[Count], str]) -> str:
        values = list(map(show, members))
        return values[0] if len(set(values)) == 1 else ", ".join(values)

    rows = [
        (
            variant if fused else f"{variant}, AdamW not fused",
            cell(members, lambda count: str(count.ops)),
            cell(members, lambda count: str(count.launches)),
            cell(
                members,
                lambda count: f"{count.syncs} + {count.late} late" if count.late else str(count.syncs),
            ),
            cell(members, lambda count: f"{count.read:.2f}"),
            cell(members, lambda count: f"{count.write:.2f}"),
        )
        for (variant, fused), members in groups.items()
        if any(count.ops or count.syncs for count in members)
    ]
    return _table(("variant", "operations", "launches", "waits", "read", "written"), rows)


def _time_table(timed: Timed) -> str:
    rows = []
    for name in timed:
        if name == BARE:
            continue
        variant = VARIANTS[name]
        for kind, wanted in (("hot", is_hot), ("logged", is_logged)):
            # a row of its own only where something is done at that kind of step
            if variant.acts_on_hot_steps if kind == "hot" else _logs(variant.offers):
                rows.append(
                    (
                        name,
                        kind,
                        _spread(timings.ratio(timed, name, wanted)),
                        _spread(timings.added(timed, name, wanted)),
                    )
                )
    return _table(("variant", "step", "times bare", "ms added"), rows)


def _logs(offers: str) -> bool:
    return offers.startswith("logs")


def _bar_table(found: Iterable[Bar]) -> str:
    return _table(("bar", "found", ""), [(bar.promise, bar.found, f"**{bar.verdict}**") for bar in found])


def _spread(spread: Spread) -> str:
    return f"{spread.middle:.3g} ({spread.low:.3g} to {spread.high:.3g})"


def _listed(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
