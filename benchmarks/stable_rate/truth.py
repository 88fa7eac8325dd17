"""Trains at every rate of a grid without clipping, to know the largest one that trains.

`python -m benchmarks.stable_rate.truth` appends to truth.jsonl what is missing there: for each network,
optimizer and order of the data, and for four rates a decade, the mean loss of the last 15 of 100 batches
before training and on the way past them. The truth is made of these: the end of the unbroken range of rates,
from the best one upward, that train.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from benchmarks.ensemble import ensemble
from benchmarks.records import add_record, read_records
from benchmarks.stable_rate.cells import NETWORKS, OPTIMIZERS, Network

TRUTH = Path(__file__).parent / "truth.jsonl"
STEPS, LAST, SIZE, ORDERS = 100, 15, 32, (0, 1)
#: Share of the progress of the best rate that a rate must make to train.
PROGRESS = 0.25
#: Exponents of 10.
GRID = {
    **dict.fromkeys(("SGD", "momentum"), [x / 4 for x in range(-12, 6)]),
    **dict.fromkeys(("Adam", "AdamW"), [x / 4 for x in range(-16, 3)]),
}
Curve = Mapping[float, tuple[float, float]]


def network_of(network: Network) -> nn.Module:
    """Returns the network, the same at each call."""
    torch.manual_seed(0)
    return network.make()


def curves(network: Network, order: int) -> dict[str, dict[float, tuple[float, float]]]:
    """Trains at all rates; returns the losses before and after by optimizer and exponent."""
    data = network.data(STEPS, SIZE, torch.Generator().manual_seed(100 + order))
    members = [(o, x) for o in OPTIMIZERS for x in GRID[o]]
    modules, rates = [network_of(network)] * len(members), [10**x for _, x in members]
    trained = ensemble(modules, network.loss, [o for o, _ in members], rates)
    with torch.no_grad():
        start = torch.stack([trained.losses(*batch)[0] for batch in data[-LAST:]]).mean(0).tolist()
    end = torch.stack([trained.step(*batch) for batch in data])[-LAST:].mean(0).tolist()
    found: dict[str, dict[float, tuple[float, float]]] = defaultdict(dict)
    for (optimizer, x), *losses in zip(members, start, end, strict=True):
        found[optimizer][x] = (losses[0], losses[1])
    return found


def largest_rate(curve: Curve) -> float:
    """Returns the largest rate that trains."""
    gains = {x: start - end if math.isfinite(end) else -math.inf for x, (start, end) in curve.items()}
    best = max(gains, key=lambda x: gains[x])
    largest = best
    for x in sorted(x for x in gains if x > best):
        if not gains[x] > PROGRESS * gains[best]:
            break
        largest = x
    return float(10**largest)


def truth(path: Path = TRUTH) -> dict[tuple[str, str], float]:
    """Returns the largest rate that trains of each network and optimizer, the geometric mean over orders."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in read_records(path):
        curve = {float(x): (losses[0], losses[1]) for x, losses in record["losses"].items()}
        found[record["network"], record["optimizer"]].append(largest_rate(curve))
    return {cell: math.prod(rates) ** (1 / len(rates)) for cell, rates in found.items()}


def main() -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stable_rate.truth", description=__doc__)
    parser.add_argument("--kept", type=Path, default=TRUTH, help="file of the outcomes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {(record["network"], record["order"]) for record in read_records(options.kept)}
    for order in ORDERS:
        for name, network in NETWORKS.items():
            if (name, order) in known:
                continue
            for optimizer, losses in curves(network, order).items():
                kept = {x: [float(f"{loss:.4g}") for loss in pair] for x, pair in losses.items()}
                record = {"network": name, "optimizer": optimizer, "order": order, "losses": kept}
                add_record(options.kept, record)


if __name__ == "__main__":
    main()
