"""Limits of the cost of the suite, and verdicts from counts and times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.cost import timings
from benchmarks.cost.counts import Count
from benchmarks.cost.interleaved import is_logged
from benchmarks.cost.memory import Look
from benchmarks.cost.networks import ELEMENTS, LARGE
from benchmarks.cost.peers import BARE, CLIP, DEFERRED, EXACT, IDLE, PEERS, SINGLE, VARIANTS
from benchmarks.cost.timings import DEEPCOPY, KEPT, NEVER, Spread, Timed

#: Operations that six callbacks may add to a hot step.
OPS = 64
#: Of the gradients' bytes, where they are so many: what numbers by tensor and history may take beside them.
BESIDE, MANY_BYTES = 0.01, 10e6
#: Of what `clip_grad_norm_` adds.
SHARE_OF_CLIP = 0.75
#: Of a bare step of the BoringModel, which is all overhead: the suite, and each callback by itself.
BORING = {EXACT: 1.35, DEFERRED: 1.6, **{name: 1.2 for name in SINGLE if name != IDLE}}
#: A logged step of the suite, of a bare one.
LOGGED = {"GPT": 1.06, "ResNet-34": 1.15, "2,000 small tensors": 1.15, "BoringModel": 3}
#: A snapshot every 50 steps: of a step, and times cheaper than `copy.deepcopy`.
SHARE_OF_STEP, TIMES_CHEAPER = 0.01, 4
#: A long run: how much slower it may have become, and MB that it may have gained on a bare one.
SLOWER, MEGABYTES = 1.1, 10

Verdict = Literal["pass", "miss", "open"]


@dataclass(frozen=True)
class Bar:
    """A limit, and the verdict on it.

    Args:
        promise: In words, with its figure.
        found: The measured value.
        verdict: `"open"` where the quartiles lie on both sides: the noise is larger than the difference.
    """

    promise: str
    found: str
    verdict: Verdict


def of_counts(counts: Sequence[Count]) -> Iterator[Bar]:
    """Bars that do not depend on the machine."""
    for variant, limit in ((EXACT, 1), (DEFERRED, 0)):
        ours = [count for count in counts if count.variant == variant]
        hot = [count for count in ours if count.kind == "hot"]
        most = max(count.syncs for count in hot)
        yield Bar(f"{variant}: syncs of a hot step, at most {limit}", str(most), _at_most(most, limit))
        for fused in (True, False):
            of_kind = {count.tensors: count for count in hot if count.fused == fused}
            heavy = [count for count in of_kind.values() if 4 * ELEMENTS * count.tensors >= MANY_BYTES]
            optimizer = "fused AdamW" if fused else "AdamW"
            ops = [count.ops for count in of_kind.values()]
            yield Bar(
                f"{variant}, {optimizer}: operations of a hot step, at most {OPS}",
                str(max(ops)),
                _at_most(max(ops), OPS),
            )
            yield Bar(
                f"{variant}, {optimizer}: the same number for {_listed(of_kind)} tensors",
                _listed(ops),
                "pass" if len(set(ops)) == 1 else "miss",
            )
            for what, found, whole in (
                ("read", max(count.read for count in heavy), 1 if fused else 2),
                ("written", max(count.write for count in heavy), 0 if fused else 1),
            ):
                yield Bar(
                    f"{variant}, {optimizer}: gradients {what} at most {whole + BESIDE:.2f} times",
                    f"{found:.3f}",
                    _at_most(found, whole + BESIDE),
                )
        transfers = {(c.kind, c.tensors, c.fused): c.syncs for c in ours}
        more = max(
            transfers["logged", count.tensors, count.fused] - transfers["hot", count.tensors, count.fused]
            for count in hot
        )
        yield Bar(f"{variant}: transfers that a logged step adds, at most 1", str(more), _at_most(more, 1))


def of_boring(timed: Timed) -> Iterator[Bar]:
    """Bars of a step that is all overhead."""
    for variant, limit in BORING.items():
        if variant in timed:
            ratio = timings.ratio(timed, variant)
            yield Bar(
                f"{variant}: a hot step of the BoringModel takes at most {limit} times a bare one",
                f"{ratio.middle:.2f}",
                _below(ratio, limit),
            )


def of_logged_steps(whole: Mapping[str, Timed]) -> Iterator[Bar]:
    """Bars of the steps that write to the logger."""
    for network, limit in LOGGED.items():
        if network in whole and EXACT in whole[network]:
            ratio = timings.ratio(whole[network], EXACT, is_logged)
            yield Bar(
                f"{network}: a logged step takes at most {limit} times a bare one",
                f"{ratio.middle:.2f}",
                _below(ratio, limit),
            )


def of_hot_steps(whole: Mapping[str, Timed], prepared: Mapping[str, Timed]) -> Iterator[Bar]:
    """Bars of the overhead of a hot step, beside that of peers."""
    for variant in (EXACT, DEFERRED):
        for network in (name for name in LARGE if name in prepared):
            timed = prepared[network]
            ours = timings.added(timed, variant).middle
            share = ours / timings.added(timed, CLIP).middle
            rest = timings.added(timed, variant, less=(SHARE_OF_CLIP, CLIP))
            yield Bar(
                f"{variant}, {network}: adds at most {SHARE_OF_CLIP} of what `clip_grad_norm_` adds",
                f"{share:.2f}",
                _below(rest, 0.0),
            )
    for variant in (EXACT, DEFERRED):
        for network in (name for name in LARGE if name in prepared and name in whole):
            verdicts: dict[str, Verdict] = {}
            for peer in PEERS:
                if VARIANTS[peer].acts_on_hot_steps:
                    timed = prepared[network] if peer in prepared[network] else whole[network]
                    verdicts[peer] = _below(timings.added(timed, variant, to=peer), 0.0)
            above = [peer for peer, verdict in verdicts.items() if verdict == "miss"]
            unclear = [peer for peer, verdict in verdicts.items() if verdict == "open"]
            parts = [f"above {', '.join(above)}"] * bool(above) + [f"open: {', '.join(unclear)}"] * bool(
                unclear
            )
            yield Bar(
                f"{variant}, {network}: adds less than every peer that acts on hot steps",
                "; ".join(parts) or f"less than all {len(verdicts)}",
                "miss" if above else "open" if unclear else "pass",
            )


def of_snapshots(whole: Mapping[str, Timed], kept: Mapping[str, Timed]) -> Iterator[Bar]:
    """Bars of the cost of snapshots."""
    for network, timed in kept.items():
        ours = timings.added(timed, KEPT, timings.is_kept, to=NEVER)
        theirs = timings.added(timed, DEEPCOPY, timings.is_kept)
        step = timings.typical(whole[network][BARE])
        yield Bar(
            f"{network}: a snapshot every 50 steps takes at most {SHARE_OF_STEP:.0%} of a step",
            f"{ours.middle / 50 / step:.2%}",
            _below(ours, 50 * step * SHARE_OF_STEP),
        )
        yield Bar(
            f"{network}: a snapshot is at least {TIMES_CHEAPER} times cheaper than `copy.deepcopy`",
            f"{theirs.middle / ours.middle:.1f}",
            _times_cheaper(ours, theirs),
        )


def of_long_run(bare: Sequence[Look], guarded: Sequence[Look]) -> Iterator[Bar]:
    """Bars of a long run: time and memory stay constant."""
    slower = guarded[-1].milliseconds / guarded[0].milliseconds
    yield Bar(
        f"the last thousand steps take at most {SLOWER} times as long as the first",
        f"{slower:.2f}",
        _at_most(slower, SLOWER),
    )
    # by then matplotlib has been loaded, for the first heat map, after a thousand steps
    gained = (guarded[-1].megabytes - guarded[1].megabytes) - (bare[-1].megabytes - bare[1].megabytes)
    yield Bar(
        f"gains at most {MEGABYTES} MB on a bare run after the first two thousand steps",
        f"{gained:.1f} MB",
        _at_most(gained, MEGABYTES),
    )


def _at_most(found: float, limit: float) -> Verdict:
    return "pass" if found <= limit else "miss"


def _below(found: Spread, limit: float) -> Verdict:
    return "pass" if found.high <= limit else "miss" if found.low > limit else "open"


def _times_cheaper(ours: Spread, theirs: Spread) -> Verdict:
    if ours.low <= 0:  # the noise is larger than the difference
        return "open"
    if ours.high * TIMES_CHEAPER <= theirs.low:
        return "pass"
    return "miss" if ours.low * TIMES_CHEAPER > theirs.high else "open"


def _listed(values: Iterable[int]) -> str:
    return ", ".join(f"{value:,}" for value in values)
