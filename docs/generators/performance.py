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
from benchmarks.cost.peers import BARE, EVERY, EXACT, LOG_EVERY, VARIANTS
from benchmarks.cost.timings import DEEPCOPY, KEPT, NEVER, WARM_UP, Spread, Timed
from lightning_gradguard.core.norms import CHUNK

PAGE = Path(__file__).parents[1] / "performance.md"
HEAD = """# What the suite costs

Counts and times. `make bench` measures all of it on your machine and writes this page, tables and sentences
included.

*The suite* is all six callbacks with their defaults, with one host synchronization a step; *deferred* is the
same with `NaNRollback(check="deferred")`, without synchronization. The warm-up of clipping is three steps
here, as is that of ZClip, so that the cost after the warm-up is measured. A *hot* step is one that is not
logged, which nearly all steps are. Every fit is a real `Trainer.fit` with fused AdamW, the fastest optimizer,
so that the relative overhead is as large as it can be.

A bar is *open* if quartiles lie on both sides of it: the noise is then larger than the difference, and
nothing is claimed. Times are valid on an idle machine only: on a busy one every step is delayed, and the
overhead seems small.
"""

REASONS = """## Why it is not less

* *Python calls.* One healthy, unlogged batch of a network with batch normalization makes 140 calls of the
  package, with 96 moves between its files (`python -m benchmarks.cost.calls`, Python 3.11; from 3.12 on list
  comprehensions make no calls). It was 273 and 114. No call takes more than a few percent of what is added
  to a step of the BoringModel. Lightning calls each hook of each callback in a context of its profiler,
  whether it is overridden or not: six callbacks that do nothing take as much as a third of it. While the
  suite trains, its hooks that do nothing are `None`, which Lightning passes over, and callbacks that are
  neighbours in its list share one hook: 5 calls a step, not 36. A callback of another kind in between has its
  turn, and under a profiler each hook is called. The suite adds 241 calls of all packages to the 998 of that
  batch (252 before), 295 under `check="deferred"` (677), where a CPU copies nothing for a step that it knows
  to be good, and 477 to a logged one (654).
* *First calls of a step.* After a backward pass the processor's caches hold other code: an operation on
  tensors that takes 1 to 3 microseconds in a loop takes 5 to 10 in a step. Of a hot step of the BoringModel,
  measuring takes about 60 microseconds, what a replay needs of the batch and the generators 40, the
  detectors and the commit 20, and the clipping policy 20; six callbacks that do nothing take 62, of which a
  sixth is left.
* *Each callback alone* measures all gradients, also `LearningRateBackoff`, which needs no norm.
* *TensorBoard.* The numbers of a logged step are one event: with 42 tensors, a logged batch writes 2 events,
  not 145, and makes 10,936 Python calls in all packages, not 13,411.
* *Update ratios* come from a copy of the weights, at 4 reads and 2 writes. With torch's operations, an update
  of Adam computed from its state takes at least 5 reads and 3 writes (square root, epsilon, quotient, norm),
  and would not be the one that was made where a weight is rounded: an update that is lost in bfloat16 is what
  `weight_stagnation` is about.
* *Deferred checking* copies weights and moments of an optimizer that is not fused, 3 reads and 3 writes, for
  its step destroys all of them: a bad one leaves NaN in each, and floating-point updates have no exact
  inverse. The suite does not make an optimizer fused by itself: its updates would differ in the last bits
  from those of a run without the suite. `AdamW(..., fused=True)` is one argument, and needs no copy. The
  counts above are those of a device: a CPU knows at once that a step is good, and copies nothing.
  The default clipping policy keeps its history on the host, and computes on the device only what depends on
  the step itself: a deferred hot step has 52 operations and reads two transfers late.
* *Memory.* 10,000 steps of the BoringModel with a picture every 1,000: at most 467 MB in use in the first
  2,000 steps, 470 in all. A picture frees its pixels, and six leave no memory behind.
  Objects do not grow in number between two pictures.
* *Import.* Of 7.1 CPU seconds for `import lightning_gradguard`, 6.1 are those of `import pytorch_lightning`,
  which loads matplotlib as well; `fit --help` takes 6.9.
"""


@dataclass
class Found:
    """Measurements of the cost; empty where nothing was measured.

    Args:
        load: Runnable processes before the start.
        counts: Operations, synchronizations and bytes that are added to a step.
        whole: Steps by network.
        prepared: Steps of hooks and optimizer, by network.
        kept: Steps with a snapshot, by network.
        peaks: Peak memory in MB, by variant.
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
    """Renders the page, or its measured parts."""
    parts = [
        HEAD,
        f"{torch.get_num_threads()} cores of an {platform.machine()} CPU, torch {torch.__version__}, "
        f"Lightning {version('pytorch_lightning')}, Python {platform.python_version()}; "
        f"{found.load:.1f} processes were runnable before the start. No GPU was used: synchronizations and "
        "launches are counts, not times.\n",
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
    return "\n".join([*parts, REASONS])


def _counts(found: Found) -> list[str]:
    return [
        "## Counted\n",
        f"Overhead of a bare step, with {_listed(TENSORS)} tensors of {ELEMENTS:,} elements each. On a "
        f"CPU the suite measures a tensor of more than {CHUNK:,} by rows, for accuracy, with an operation "
        "for each such tensor; these numbers exclude that. Operations are calls of torch's dispatcher "
        "without views. Syncs are synchronizations of the host with the device, which are free on a CPU and "
        "are counted all the same. Launches are a model of the kernels that CUDA would launch. Bytes read "
        "and written are multiples of the bytes of all gradients, over all operations except the "
        "optimizer's own; if gradients have few bytes, a handful of other numbers is visible beside them. "
        "A deferred step reads on the host the values that were sent a step before (*late*), without a "
        "synchronization with later work of the device. Rows use fused AdamW unless they state otherwise.\n",
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
        f"process, in a random order in each round, after {WARM_UP} warm-up rounds. A step lasts from one "
        "request for a batch to the next. Ratios and differences are relative to the bare step of the same "
        "round, medians with quartiles. *bare, again* is the same as bare: differences as small as its own "
        f"are noise. Every {LOG_EVERY}th step is logged; those around the suite's snapshots, every "
        f"{SNAPSHOT_EVERY}, are excluded here. A turn of the BoringModel is {timings.IN_A_ROW} steps, after "
        f"{timings.SETTLE} warm-up steps: its steps are all overhead, and the caches should be those of one "
        "fit; they are measured in CPU time. Tensors above 65,536 elements add one operation each on a CPU; "
        "small tensors of one shape are copied before they are measured, and so read twice.\n",
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
    return [*parts, "### Logged steps\n", _bar_table(bars.of_logged_steps(found.whole))]


def _prepared(found: Found) -> list[str]:
    parts = [
        "## Hooks and optimizer alone\n",
        "In a step of 300 ms, a few milliseconds are lost in the noise. Here the same parameters get "
        "prepared gradients, written in each step, so that a step consists of Lightning, its hooks and "
        "the optimizer. Ratios are relative to that, and are not those of training.\n",
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
        "Cost of keeping weights and optimizer state in memory for a rollback. Steps of the suite with a "
        "snapshot are compared with those of a suite without snapshots, and steps with a `copy.deepcopy` of "
        "the state dicts with bare steps; without a backward pass, as above. Shares are of a whole bare "
        f"step, for one snapshot every {SNAPSHOT_EVERY} steps.\n",
        _table(("network", "by", "ms", "of a step"), rows),
        _bar_table(bars.of_snapshots(found.whole, found.kept)),
    ]


def _peaks(found: Found) -> list[str]:
    bare = found.peaks[BARE]
    rows = [(name, f"{most:,.0f}", f"{most - bare:+,.0f}") for name, most in found.peaks.items()]
    return [
        "## Memory\n",
        "Peak memory of a process that trains the GPT for five steps, in MB, with the first snapshot. Each "
        "further snapshot, up to `keep_snapshots + 1`, takes as much again as weights and optimizer state.\n",
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
        "The BoringModel, on one thread, logged every 50 steps: the first and the last thousand steps. The "
        "mean includes logging and snapshots; memory is the peak so far, at the end of the second thousand "
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
    return _table(("variant", "operations", "launches", "syncs", "read", "written"), rows)


def _time_table(timed: Timed) -> str:
    rows = []
    for name in timed:
        if name == BARE:
            continue
        variant = EVERY[name]
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
