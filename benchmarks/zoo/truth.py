"""Trains the networks of the zoo, to know which of them fail to train.

`python -m benchmarks.zoo.truth` appends to truth.jsonl what is missing there; a process of several takes its
share by `--part 0/2`. A network trains under an optimizer if at one of three rates its accuracy on fresh
batches reaches 60 % within 1,200 steps. Networks of one architecture are trained side by side, until they do.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.ensemble import ensemble
from benchmarks.zoo.entries import Entry, entries

TRUTH = Path(__file__).parent / "truth.jsonl"
STEPS, SIZE, EVERY = 1200, 32, 40
TRAINS = 0.6
#: Optimizers by the name that a table gives them, with their rates; SGD has a momentum of 0.9.
RATES = {"momentum": (0.05, 0.015, 0.005), "Adam": (3e-3, 1e-3, 3e-4)}


def network_of(entry: Entry) -> nn.Module:
    """Returns the network of an entry, the same at each call."""
    torch.manual_seed(sum(map(ord, entry.name)))
    return entry.make()


def accuracies(alike: Sequence[tuple[Entry, str]]) -> dict[tuple[str, str], dict[float, float]]:
    """Trains entries of one architecture, each under an optimizer; returns the best accuracies by rate."""
    members = [(e, o, rate) for e, o in alike for rate in RATES[o]]
    found: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    networks = [network_of(e) for e, _, _ in members]
    trained = ensemble(
        networks, functional.cross_entropy, [o for _, o, _ in members], [r for *_, r in members]
    )
    generator, data = torch.Generator().manual_seed(1), alike[0][0].data
    for _ in range(STEPS // EVERY):
        for x, y in data(EVERY, SIZE, generator):
            losses = trained.step(x, y)
        (x, y), *_ = data(1, 512, generator)
        with torch.no_grad():
            scores = (trained.losses(x, y)[1].argmax(2) == y).float().mean(1).tolist()
        for (e, o, rate), score in zip(members, scores, strict=True):
            of_entry = found[e.name, o]
            of_entry[rate] = max(of_entry.get(rate, 0.0), round(score, 3))
        finite = losses.isfinite().tolist()
        open_ = [max(found[e.name, o].values()) < TRAINS for e, o, _ in members]
        kept = [i for i in range(len(members)) if finite[i] and open_[i]]
        if not kept:
            break
        trained.keep(kept)
        members = [members[i] for i in kept]
    return found


def main() -> None:
    """Trains what is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.zoo.truth", description=__doc__)
    parser.add_argument("--part", default="0/1", help="which part of how many")
    parser.add_argument("--kept", type=Path, default=TRUTH, help="file of the outcomes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # networks that vanish are slow otherwise
    part, of = map(int, options.part.split("/"))
    lines = options.kept.read_text().splitlines() if options.kept.exists() else []
    known = {(record["name"], record["optimizer"]) for record in map(json.loads, lines)}
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for entry in entries():
        groups[entry.family, entry.architecture].append(entry)
    everything = list(groups.values())
    random.Random(0).shuffle(everything)  # what is there when it is stopped is of all families
    for group in everything[part::of]:
        missing = [(entry, o) for entry in group for o in RATES if (entry.name, o) not in known]
        if missing:
            found = accuracies(missing)
            with options.kept.open("a") as file:
                for (name, optimizer), of_rates in found.items():
                    record = {"name": name, "optimizer": optimizer, "accuracy": of_rates}
                    file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
