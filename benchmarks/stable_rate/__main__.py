"""Compares the trial of rates with the grid search, and runs it on healthy programs.

`python -m benchmarks.stable_rate` writes the tables of docs/stable_rate.md. Outcomes are kept in
outcomes.jsonl, and a run that was stopped continues.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from benchmarks.casebook import healthy as casebook
from benchmarks.evidence.healthy import SCENARIOS
from benchmarks.faults.runs import quietly
from benchmarks.quiet_trainer import QUIET
from benchmarks.records import add_record, read_records, write_section
from benchmarks.stable_rate.cells import NETWORKS, OPTIMIZERS
from benchmarks.stable_rate.truth import SIZE, network_of, truth
from lightning_gradguard import InitializationCheck

PAGE = Path("docs/stable_rate.md")
KEPT = Path(__file__).parent / "outcomes.jsonl"


class Cell(pl.LightningModule):
    """A network and an optimizer at a rate that may be anything."""

    def __init__(self, name: str, optimizer: str, rate: float = 0.01) -> None:
        super().__init__()
        self.network, self.loss = network_of(NETWORKS[name]), NETWORKS[name].loss
        self.optimizer, self.rate = optimizer, rate

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Returns the loss."""
        return self.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        """Returns the optimizer."""
        return OPTIMIZERS[self.optimizer](self.parameters(), lr=self.rate)


class _End(Exception):
    """Ends a fit ahead of its first step."""


class _EndBeforeStep(pl.Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        raise _End

    def on_train_batch_end(self, *_: Any) -> None:
        raise _End  # of manual optimization


def tried(module: pl.LightningModule, batches: Any, **options: Any) -> dict[str, Any]:
    """Returns what the check finds of the rate of a module."""
    check = InitializationCheck(rate_trial=True)
    how = {**QUIET, "max_epochs": 1, **options}
    with contextlib.suppress(_End), tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(**how, default_root_dir=folder, callbacks=[check, _EndBeforeStep()])
        trainer.fit(module, DataLoader(batches, batch_size=None))
    found = [f for f in check.findings if f.criterion.startswith("learning_rate")]
    rates = {name: check.values.get(name) for name in ("learning_rate", "largest_stable_rate")}
    return {**rates, "finding": f"{found[0].criterion}, {found[0].severity}" if found else ""}


def runs() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields every run with its name: cells, and healthy programs of the casebook and of the evidence."""
    for name, optimizer in itertools.product(NETWORKS, OPTIMIZERS):

        def cell(name: str = name, optimizer: str = optimizer) -> dict[str, Any]:
            data = NETWORKS[name].data(40, SIZE, torch.Generator().manual_seed(7))
            return tried(Cell(name, optimizer), data)

        yield f"cell: {name}, {optimizer}", cell
    for case in casebook.cases():

        def of_case(case: Any = case) -> dict[str, Any]:
            pl.seed_everything(0, verbose=False)
            return tried(case.make(), case.data(200), **case.trainer)

        yield f"casebook: {case.name}", of_case
    for scenario in SCENARIOS:

        def of_scenario(scenario: Any = scenario) -> dict[str, Any]:
            program = scenario.make(0)
            return tried(program.module, program.batches)

        yield f"evidence: {scenario.name}", of_scenario


def table(outcomes: dict[str, dict[str, Any]]) -> str:
    """Returns the tables in Markdown."""
    known = truth()
    rows: dict[str, list[float]] = {}
    cells = []
    for (name, optimizer), largest in known.items():
        outcome = outcomes.get(f"cell: {name}, {optimizer}")
        if outcome is not None:
            estimate = outcome["largest_stable_rate"]
            ratio = math.nan if estimate is None else estimate / largest
            for row in (optimizer, "all"):
                rows.setdefault(row, []).append(ratio)
            cells.append(
                f"| {name} | {optimizer} | {largest:.2g} | {estimate or math.nan:.2g} | {ratio:.2g} |"
            )
    lines = [
        "| optimizer | cells | within a factor of 3 | lowest, median, highest ratio |",
        "|---|---|---|---|",
    ]
    for row in (*OPTIMIZERS, "all"):
        ratios = rows.get(row, [])
        within = sum(1 / 3 <= ratio <= 3 for ratio in ratios)
        defined = sorted(ratio for ratio in ratios if ratio == ratio) or [math.nan]
        spread = f"{defined[0]:.2g}, {median(defined):.2g}, {defined[-1]:.2g}"
        lines.append(f"| {row} | {len(ratios)} | {within} ({within / max(len(ratios), 1):.0%}) | {spread} |")
    lines += ["", "| healthy programs | tried | named too high | named too low |", "|---|---|---|---|"]
    for group in ("casebook", "evidence"):
        members = {n: o for n, o in outcomes.items() if n.startswith(f"{group}:")}
        tried_ = [o for o in members.values() if o["learning_rate"] is not None]
        high, low = (
            [n for n, o in members.items() if o["finding"].startswith(f"learning_rate_too_{way}")]
            for way in ("high", "low")
        )
        named = [f"{len(names)}{': ' if names else ''}{', '.join(names)}" for names in (high, low)]
        lines.append(f"| {group}, {len(members)} | {len(tried_)} | {named[0]} | {named[1]} |")
    head = ["", "| network | optimizer | grid search | trial | ratio |", "|---|---|---|---|---|"]
    return "\n".join([*lines, *head, *cells])


def main() -> None:
    """Runs what is missing, and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stable_rate", description=__doc__)
    parser.add_argument("--kept", type=Path, default=KEPT, help="file of the outcomes")
    parser.add_argument("--only", default="", help="run what has this in its name")
    options = parser.parse_args()
    torch.set_num_threads(1)
    outcomes = {record.pop("name"): record for record in read_records(options.kept)}
    for name, run in runs():
        if name not in outcomes and options.only in name:
            outcomes[name] = quietly(run)
            add_record(options.kept, {"name": name, **outcomes[name]})
    made = table(outcomes)
    print(made)
    if PAGE.exists() and not options.only:
        write_section(PAGE, "rates", made)


if __name__ == "__main__":
    main()
