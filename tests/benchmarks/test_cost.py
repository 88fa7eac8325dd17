"""Interleaved fits equal separate ones, and bars can be missed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.cost import bars, timings
from benchmarks.cost.counts import Count, count
from benchmarks.cost.interleaved import (
    ENDLESS,
    SNAPSHOT_EVERY,
    Seconds,
    fits,
    is_hot,
    is_logged,
    time_in_turn,
)
from benchmarks.cost.memory import Look
from benchmarks.cost.meter import Meter
from benchmarks.cost.networks import ELEMENTS, LARGE, Boring, Counted, Prepared, Tensors
from benchmarks.cost.peers import AGAIN, BARE, CLIP, DEFERRED, EXACT, LOG_EVERY, PEERS, VARIANTS
from benchmarks.cost.timings import DEEPCOPY, KEEP_EVERY, KEEPING, KEPT, NEVER, is_kept
from docs.generators.performance import Found, page

pytestmark = pytest.mark.filterwarnings("ignore")


def weights(names: list[str], steps: int) -> dict[str, list[torch.Tensor]]:
    modules = {name: Boring() for name in names}
    with fits(modules, VARIANTS) as running:
        time_in_turn(running, steps, warm_up=0)
    return {name: [p.detach() for p in module.parameters()] for name, module in modules.items()}


def test_interleaved_fit_equals_separate_fit() -> None:
    beside = weights([BARE, AGAIN, EXACT, CLIP, "`detect_anomaly`", "`grad_norm`, `log_dict`"], steps=12)
    alone = weights([BARE], steps=12)[BARE]
    for name in (BARE, AGAIN, "`detect_anomaly`", "`grad_norm`, `log_dict`"):
        assert all(map(torch.equal, beside[name], alone)), name
    assert not torch.is_anomaly_enabled()


def test_a_fit_makes_the_requested_steps() -> None:
    module = Boring()
    with fits({BARE: module}, VARIANTS) as running:
        seconds = time_in_turn(running, rounds=3, warm_up=2)
        assert module.trainer.global_step == 5
        assert module.trainer.num_training_batches == ENDLESS
    assert list(seconds[BARE]) == [3, 4, 5]
    assert all(took > 0 for took in seconds[BARE].values())


def test_prepared_gradients_arrive_and_move_the_weights() -> None:
    module = Prepared(Tensors(Boring))
    before = [p.detach().clone() for p in module.parameters()]
    with fits({BARE: module}, VARIANTS) as running:
        running[BARE].step()
        total = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    assert float(total) == pytest.approx(2.0)
    assert not any(map(torch.equal, before, module.parameters()))


def test_hot_logged_and_other_steps() -> None:
    assert [step for step in range(48, 58) if is_hot(step)] == [48, 49, 53, 54, 56, 57]
    assert [step for step in range(40, 61) if is_logged(step)] == [40, 45, 55, 60]


def test_snapshots_are_taken_where_they_are_timed() -> None:
    size = 4 * ELEMENTS * 20
    written: dict[str, list[float]] = {}
    for name in (NEVER, KEPT):
        with fits({name: Counted(20)}, KEEPING) as running:
            written[name] = []
            for _ in range(4 * KEEP_EVERY):
                with Meter() as meter:
                    running[name].step()
                written[name].append(meter.write / size)
    for step, (without, kept) in enumerate(zip(written[NEVER], written[KEPT], strict=True), 1):
        if step > 1:  # both take the first, with which they can roll back to the start
            assert kept - without == pytest.approx(3.0 if is_kept(step) else 0.0, abs=0.1), step


@pytest.mark.parametrize("variant", [EXACT, DEFERRED])
def test_hot_steps_take_no_snapshots(variant: str) -> None:
    with fits({variant: Counted(20)}, VARIANTS) as running:
        ops: dict[bool, set[int]] = {True: set(), False: set()}
        for step in range(1, 2 * SNAPSHOT_EVERY + LOG_EVERY):
            with Meter() as meter:
                running[variant].step()
            if step > timings.WARM_UP:
                ops[is_hot(step)].add(meter.ops)
    assert len(ops[True]) == 1
    assert len(ops[False]) > 1


def test_what_clipping_adds_is_counted() -> None:
    assert count([AGAIN], [2], fused=True)[0] == Count(AGAIN, 2, True, "hot", 0, 0, 0, 0, 0.0, 0.0)
    two, twenty = (found for found in count([CLIP], [2, 20], fused=True) if found.kind == "hot")
    assert two.ops == twenty.ops > 0
    assert two.syncs == 0
    assert [two.read, two.write] == pytest.approx([2, 1], abs=0.01)
    (loop, _) = count(["`.norm().item()` loop"], [20], fused=True)
    assert (loop.ops, loop.syncs) == (20, 20)


GOOD = [
    Count(variant, tensors, fused, kind, 60, 60, waits + (kind == "logged"), 0, read, write)
    for variant, waits in ((EXACT, 1), (DEFERRED, 0))
    for fused, read, write in ((True, 1.0, 0.0), (False, 2.0, 1.0))
    for tensors in (200, 2000)
    for kind in ("hot", "logged")
]


@pytest.mark.parametrize(
    ("worse", "missed"),
    [
        ({}, []),
        ({"syncs": 2}, ["syncs"]),
        ({"ops": 65}, ["operations", "the same number"]),
        ({"ops": 59}, ["the same number"]),
        ({"read": 2.02}, ["gradients read"]),
        ({"write": 1.02}, ["gradients written"]),
    ],
)
def test_counts_can_miss(worse: dict[str, int], missed: list[str]) -> None:
    place = next(i for i, c in enumerate(GOOD) if c.variant == EXACT and not c.fused and c.kind == "hot")
    counts = [*GOOD[:place], replace(GOOD[place], **worse), *GOOD[place + 1 :]]  # type: ignore[arg-type]
    promises = [bar.promise for bar in bars.of_counts(counts) if bar.verdict == "miss"]
    assert len(promises) == len(missed)
    assert all(what in promise for what, promise in zip(missed, promises, strict=True))


def test_logged_step_with_too_many_syncs_is_a_miss() -> None:
    counts = [replace(c, syncs=3) if c.kind == "logged" and c.variant == EXACT else c for c in GOOD]
    (bar,) = (bar for bar in bars.of_counts(counts) if bar.verdict == "miss")
    assert (bar.promise, bar.found) == ("suite: transfers that a logged step adds, at most 1", "2")


def steady(**milliseconds: float) -> dict[str, Seconds]:
    """Steps of these lengths, which vary a little."""
    return {
        name: {step: took / 1e3 * (1 + 0.001 * (step % 3)) for step in range(6, 40)}
        for name, took in milliseconds.items()
    }


def hot_steps(ours: float) -> list[str]:
    others = {name: 130.0 for name in PEERS}
    timed = steady(**{**others, BARE: 100, CLIP: 110, EXACT: ours, DEFERRED: ours})
    network = LARGE[0]
    return [bar.verdict for bar in bars.of_hot_steps({network: timed}, {network: timed})]


def test_times_can_miss_and_be_left_open() -> None:
    assert set(hot_steps(ours=105)) == {"pass"}
    assert set(hot_steps(ours=120)) == {"miss"}
    assert hot_steps(ours=109) == ["miss", "miss", "pass", "pass"]
    noisy = steady(**{BARE: 100, EXACT: 135, DEFERRED: 160, "`NaNRollback`": 150})
    noisy[BARE] = {step: took * (1 + 0.1 * (step % 2 - 0.5)) for step, took in noisy[BARE].items()}
    assert [bar.verdict for bar in bars.of_boring(noisy)] == ["open", "open", "miss"]


def test_logged_steps_can_miss() -> None:
    whole = {network: steady(**{BARE: 100, EXACT: 140}) for network in ("GPT", "BoringModel")}
    assert [bar.verdict for bar in bars.of_logged_steps(whole)] == ["miss", "pass"]


@pytest.mark.parametrize(
    ("snapshot", "verdicts"),
    [(10, ["pass", "pass"]), (60, ["miss", "miss"]), (30, ["pass", "miss"]), (-1, ["pass", "open"])],
)
def test_snapshots_can_miss(snapshot: float, verdicts: list[str]) -> None:
    kept = steady(**{BARE: 20, DEEPCOPY: 120, NEVER: 30, KEPT: 30 + snapshot})
    whole = steady(**{BARE: 100})
    assert [bar.verdict for bar in bars.of_snapshots({"GPT": whole}, {"GPT": kept})] == verdicts


def test_a_long_run_can_miss() -> None:
    bare, slow, fat = (
        [Look(1.0, 1.0, 400), Look(1.0, 1.0, 420), Look(1.0 * slower, 1.0, 420 + more)]
        for slower, more in ((1, 0), (1.2, 0), (1, 20))
    )
    verdicts = [[bar.verdict for bar in bars.of_long_run(bare, run)] for run in (bare, slow, fat)]
    assert verdicts == [["pass", "pass"], ["miss", "pass"], ["pass", "miss"]]


def test_page_has_the_measurements() -> None:
    timed = steady(**{name: 100.0 + 10 * i for i, name in enumerate(VARIANTS)})
    kept = steady(**{BARE: 20, DEEPCOPY: 120, NEVER: 30, KEPT: 40})
    looks = [Look(1.0, 1.0, 400), Look(1.3, 1.0, 400)]
    found = Found(
        load=0.0,
        counts=GOOD,
        whole={"GPT": timed, "BoringModel": timed},
        prepared={"GPT": timed},
        kept={"GPT": kept},
        peaks={BARE: 1000, EXACT: 1400},
        long_runs={BARE: looks, EXACT: looks},
    )
    text = page(found)
    assert "| suite | hot | 1.2 (1.2 to 1.2) | 20 (20 to 20) |" in text
    assert "| GPT | the suite | 10 (10 to 10) | 0.20% |" in text
    assert "| suite | 1,400 | +400 |" in text
    assert "| the last thousand steps take at most 1.1 times as long as the first | 1.30 | **miss** |" in text
    assert timings.typical(timed[BARE]) == pytest.approx(100, rel=0.01)
