"""Times what each variant adds to a step: fits take their steps in turn, and are compared round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.cost.interleaved import Seconds, fits, is_hot, time_in_turn
from benchmarks.cost.networks import LARGE, NETWORKS, Prepared, Tensors
from benchmarks.cost.peers import BARE, EVERY, VARIANTS, DeepCopy, Variant, suite

#: Rounds ahead of those that count: memory is first touched, optimizers get their state, ZClip warms up.
WARM_UP = 5
#: A step that is all overhead depends on what other fits have left in the processor's caches. There a turn
#: is several steps, of which the first do not count: most processes train one network.
SETTLE, IN_A_ROW = 5, 20

#: Of each fit, by name.
Timed = Mapping[str, Seconds]

#: Steps between two snapshots: no other is taken before one is qualified, which takes so many good steps.
KEEP_EVERY = 10
#: Snapshots ahead of those that count: by then memory is there for as many as are kept.
FIRST_KEPT = 4
NEVER, KEPT, DEEPCOPY = "the suite, without snapshots", "the suite, with snapshots", "`copy.deepcopy`"
KEEPING = {
    BARE: VARIANTS[BARE],
    DEEPCOPY: Variant("", "", lambda: [DeepCopy(KEEP_EVERY)]),
    NEVER: Variant("", "", lambda: suite(snapshot_every_n_steps=10**6)),
    KEPT: Variant("", "", lambda: suite(snapshot_every_n_steps=KEEP_EVERY)),
}


@dataclass(frozen=True)
class Spread:
    """Quartiles of a number that was taken many times.

    Args:
        low: A quarter is below.
        middle: The median.
        high: A quarter is above.
    """

    low: float
    middle: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Quartiles of at least two values."""
        return cls(*quantiles(values, n=4, method="inclusive"))


def whole(network: str, rounds: int, names: Collection[str] | None = None) -> Timed:
    """Steps, forward and backward pass and all. Call it in a process of its own.

    Args:
        network: One of `NETWORKS`.
        rounds: That count.
        names: Of the variants, the bare one among them; all if `None`.
    """
    variants = VARIANTS if network in LARGE else EVERY
    turn: dict[str, Any] = {}
    if network not in LARGE:
        # starting a second thread takes longer than the step; one thread has a clock of its own
        torch.set_num_threads(1)
        turn = {"settle": SETTLE, "in_a_row": IN_A_ROW, "clock": time.process_time}
    chosen = [name for name in variants if names is None or name in names]
    with fits({name: NETWORKS[network]() for name in chosen}, variants) as running:
        return time_in_turn(running, rounds, WARM_UP, **turn)


def hooks_and_optimizer(network: str, rounds: int) -> Timed:
    """Steps that consist of hooks and optimizer, of the variants that act on every step."""
    names = [name for name, v in VARIANTS.items() if v.acts_on_hot_steps and not v.needs_graph]
    tensors = Tensors(NETWORKS[network])
    with fits({name: Prepared(tensors) for name in names}, VARIANTS) as running:
        return time_in_turn(running, rounds, WARM_UP)


def keeping(network: str, snapshots: int) -> Timed:
    """The same with so many snapshots among them, of the suite and by `copy.deepcopy`."""
    tensors = Tensors(NETWORKS[network])
    with fits({name: Prepared(tensors) for name in KEEPING}, KEEPING) as running:
        return time_in_turn(running, snapshots * KEEP_EVERY, FIRST_KEPT * KEEP_EVERY)


def is_kept(step: int) -> bool:
    """True if a snapshot is taken at a step."""
    return step % KEEP_EVERY == 1


def typical(seconds: Seconds, wanted: Callable[[int], bool] = is_hot) -> float:
    """The median step, in ms."""
    return 1e3 * median(took for step, took in seconds.items() if wanted(step))


def ratio(timed: Timed, name: str, wanted: Callable[[int], bool] = is_hot) -> Spread:
    """Duration relative to a bare step."""
    bare = timed[BARE]
    return Spread.of([took / bare[step] for step, took in timed[name].items() if wanted(step)])


def added(
    timed: Timed,
    name: str,
    wanted: Callable[[int], bool] = is_hot,
    *,
    to: str = BARE,
    less: tuple[float, str] | None = None,
) -> Spread:
    """Duration of a step above that of another variant, in ms.

    Args:
        timed: Fits that took their steps in turn.
        name: The variant.
        wanted: Selects steps.
        to: Longer than this one's.
        less: A share of the time that another variant adds, to subtract.
    """
    values = []
    for step, took in timed[name].items():
        if wanted(step):
            base = timed[to][step]
            allowed = 0.0 if less is None else less[0] * (timed[less[1]][step] - base)
            values.append(1e3 * (took - base - allowed))
    return Spread.of(values)
