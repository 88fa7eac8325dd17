"""Compares spike rules at the same number of false alarms.

`python -m benchmarks.spikes` records the traces (resumed from a file), chooses for each rule the lowest
threshold with no more false alarms than ours has, averaged over kinds of series and two seeds, and prints
false alarms and recall, then what the recovery policy makes of each trace. One thread, ten minutes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from benchmarks.spikes.rules import RULES, Rule
from benchmarks.spikes.traces import DIVERGING, HEALTHY, Trace, record
from lightning_gradguard.core.recovery import RecoveryPolicy

STEPS = 2000
SEEDS = (0, 1)
THRESHOLDS = (1, 1.3, 1.6, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 7.5, 8, 8.5, 9, 10, 11, 13, 16)
#: Steps between two spikes that are put in, and the first of them.
PERIOD, FIRST = 150, 200
#: Factor, or what is added, and length of a spike.
SPIKES: dict[str, tuple[Callable[[float], float], int]] = {
    "x 1.3, 20 steps": (lambda value: 1.3 * value, 20),
    "+ 0.3 nats, 20 steps": (lambda value: value + 0.3, 20),
    "x 2, 3 steps": (lambda value: 2 * value, 3),
    "x 3, one step": (lambda value: 3 * value, 1),
    "x 10, one step": (lambda value: 10 * value, 1),
}


def noise(seed: int) -> dict[str, list[float]]:
    """Synthetic losses."""
    g, correlated, level = random.Random(seed), [], 0.0
    for _ in range(STEPS):
        level = 0.9 * level + g.gauss(0, 0.4 * math.sqrt(0.19))
        correlated.append(math.exp(level))
    return {
        "normal": [3 + g.gauss(0, 0.05) for _ in range(STEPS)],
        "lognormal .2": [2 * g.lognormvariate(0, 0.2) for _ in range(STEPS)],
        "lognormal .6": [2 * g.lognormvariate(0, 0.6) for _ in range(STEPS)],
        "AR(.9) .4": correlated,
        "t3": [max(1e-3, 10 + g.gauss(0, 1) / math.sqrt(g.gammavariate(1.5, 2) / 3)) for _ in range(STEPS)],
        "level shifts": [(3 if i // 400 % 2 else 1) * g.lognormvariate(0, 0.2) for i in range(STEPS)],
    }


#: Series into which spikes are put.
CARRIERS = ("normal", "lognormal .2", "lognormal .6", "AR(.9) .4", "t3", "language", "vae", "dqn")


def episodes(rule: Rule, values: Sequence[float]) -> int:
    """Counts alarms, those within ten steps of another once."""
    alarms, last = 0, -math.inf
    for i, value in enumerate(values):
        if rule.update(value):
            alarms += i - last > 10
            last = i
    return alarms


def false_alarms(make: Callable[[float], Rule], threshold: float, series: dict[str, list[float]]) -> float:
    """False alarms in 10,000 steps, the mean over kinds of series."""
    rates = [1e4 * episodes(make(threshold), values) / len(values) for values in series.values()]
    return sum(rates) / len(rates)


def recall(
    make: Callable[[float], Rule], threshold: float, series: dict[str, list[float]], size: str
) -> float:
    """Share of spikes that are seen while they last, the mean over carriers."""
    raised, length = SPIKES[size]
    shares = []
    for name in ("normal",) if "nats" in size else CARRIERS:
        rule, seen = make(threshold), dict[int, bool]()
        for i, value in enumerate(series[name]):
            is_on = i >= FIRST and i % PERIOD < length
            is_alarm = rule.update(raised(value) if is_on else value)
            if is_on:
                seen[i // PERIOD] = seen.get(i // PERIOD, False) or is_alarm
        shares.append(sum(seen.values()) / len(seen))
    return sum(shares) / len(shares)


def series_of(traces: Sequence[Trace], seed: int) -> dict[str, list[float]]:
    healthy = (t for t in traces if t.seed == seed and not t.diverges)
    return {**noise(seed), **{t.name: [loss for index, loss, _ in t.rows if index == 0] for t in healthy}}


def table(traces: Sequence[Trace]) -> str:
    """Rules at matched false-alarm rates, in Markdown."""
    series = [series_of(traces, seed) for seed in SEEDS]

    def alarms(make: Callable[[float], Rule], threshold: float) -> float:
        return fmean(false_alarms(make, threshold, one) for one in series)

    limit = alarms(*RULES["ours"])
    lines = [
        "| rule | threshold | false alarms | " + " | ".join(SPIKES) + " |",
        "|---|---|---|" + "---|" * len(SPIKES),
    ]
    for name, (make, published) in RULES.items():
        matched = next((t for t in THRESHOLDS if alarms(make, t) <= limit), math.inf)
        for label, threshold in {"matched": matched, "as published": published}.items():
            found = [fmean(recall(make, threshold, one, size) for one in series) for size in SPIKES]
            cells = " | ".join(f"{share:.2f}" for share in found)
            lines.append(f"| {name}, {label} | {threshold:g} | {alarms(make, threshold):.1f} | {cells} |")
    return "\n".join(lines)


def verdicts(traces: Sequence[Trace]) -> str:
    """What the policy makes of each trace: alarms, and how often it asks for the distance of the weights."""
    lines = ["| program | seed | steps | alarms | suspicions |", "|---|---|---|---|---|"]
    for trace in traces:
        policy, asked = RecoveryPolicy(3, 10, 0.5), []
        policy.is_adversarial = len({index for index, _, _ in trace.rows}) > 1
        alarms = 0
        for row in trace.rows:
            _, anomaly = policy.on_good_step(*row, distance=lambda: float(asked.append(0) or 0))  # type: ignore[func-returns-value]  # noqa: B023
            alarms += anomaly == "loss_spike"
        lines.append(f"| {trace.name} | {trace.seed} | {len(trace.rows)} | {alarms} | {len(asked)} |")
    return "\n".join(lines)


def recorded(kept: Path) -> list[Trace]:
    """The traces, those that are missing recorded first."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    lines = kept.read_text().splitlines() if kept.exists() else []
    traces = [Trace(**json.loads(line)) for line in lines]
    known = {(trace.name, trace.seed) for trace in traces}
    with kept.open("a") as file:
        for name in {**HEALTHY, **DIVERGING}:
            for seed in (0, 1):
                if (name, seed) not in known:
                    traces.append(record(name, seed))
                    file.write(json.dumps(asdict(traces[-1])) + "\n")
                    file.flush()
    return traces


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.spikes", description=__doc__)
    parser.add_argument("--kept", type=Path, default=Path("runs/spikes.jsonl"), help="file of the traces")
    traces = recorded(parser.parse_args().kept)
    print(table(traces), verdicts(traces), sep="\n\n")


if __name__ == "__main__":
    main()
