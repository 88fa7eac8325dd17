"""`lightning-gradguard demo`: trains the same network twice, with Lightning alone and with the suite."""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.loggers import TensorBoardLogger

from lightning_gradguard import GradientNormMonitor, LearningRateBackoff, TrainingDiagnosis, default_callbacks
from lightning_gradguard.report.render.text import text_table
from lightning_gradguard.runtime.incidents.journal import count_incidents
from lightning_gradguard.runtime.logging.console import shell_command

#: Last steps, whose mean loss is the final one.
FINAL = 30


@dataclass(frozen=True)
class Run:
    """Result of a training run: the loss of every step, the last learning rate, incidents by kind."""

    name: str
    losses: list[float]
    incidents: dict[str, int]
    learning_rate: float
    seconds: float

    @property
    def survived(self) -> int:
        """Number of steps before the loss became nonfinite for good."""
        return max((i + 1 for i, loss in enumerate(self.losses) if math.isfinite(loss)), default=0)

    @property
    def final_loss(self) -> float:
        """Mean loss of the last steps; NaN for a run that failed."""
        last = self.losses[-FINAL:]
        return sum(last) / len(last)


def train(
    name: str,
    callbacks: Sequence[pl.Callback],
    *,
    seed: int,
    max_steps: int,
    logdir: Path,
    gradient_clip_val: float | None = None,
) -> Run:
    """Trains the network of the demo once, and logs to the folder `name` in `logdir`."""
    # a shell completes the arguments of all modules that are imported
    from lightning_gradguard.cli.demo_task import CharacterRNN, Characters

    pl.seed_everything(seed, verbose=False)
    data = Characters(n_batches=max_steps, seed=seed)
    module = CharacterRNN(len(data.alphabet))
    losses = _Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=[losses, *callbacks],
        logger=TensorBoardLogger(logdir, name="", version=name, default_hp_metric=False),
        log_every_n_steps=1,
        gradient_clip_val=gradient_clip_val,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    scale = next((c.scale for c in callbacks if isinstance(c, LearningRateBackoff)), 1.0)
    return Run(
        name=name,
        losses=losses.values,
        incidents=count_incidents(trainer),
        learning_rate=trainer.optimizers[0].param_groups[0]["lr"] * scale,
        seconds=time.perf_counter() - start,
    )


def main(arguments: Sequence[str]) -> None:
    """Trains bare and guarded, and prints a summary; exits with code 1 if the guarded run failed."""
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if options.max_steps < 1:
        parser.error(f"--max_steps {options.max_steps} must be at least 1")
    logdir = options.logdir or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    shared: dict[str, Any] = {"seed": options.seed, "max_steps": options.max_steps, "logdir": logdir}
    print("A character-level ReLU RNN, recurrent gain 1.1, SGD 0.5, first with Lightning alone:")
    # these two watch and change nothing
    watching = [GradientNormMonitor(figure_every_n_steps=100), TrainingDiagnosis()]
    bare = train("bare", watching, **shared)
    print("\nThe same seed with default_callbacks():")
    monitor = GradientNormMonitor(figure_every_n_steps=100)
    guarded = train("guarded", default_callbacks(gradient_norm_monitor=monitor), **shared)
    print(summary([bare, guarded], logdir))
    if not math.isfinite(guarded.final_loss):
        raise SystemExit(1)


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command."""
    description = __doc__.partition(": ")[2].capitalize()
    parser = argparse.ArgumentParser(prog="lightning-gradguard demo", description=description)
    parser.add_argument("--max_steps", type=int, default=300, help="optimizer steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--logdir", type=Path, help="folder for TensorBoard; a new one if not given")
    return parser


def summary(runs: Sequence[Run], logdir: Path) -> str:
    """Returns a table of the runs, the bare one first, a comparison with the last, and the next steps."""
    head = ("run", "steps survived", "final loss", "learning rate", "seconds", "incidents")
    rows = [
        (
            run.name,
            f"{run.survived} of {len(run.losses)}",
            f"{run.final_loss:.2f}",
            f"{run.learning_rate:g}",
            f"{run.seconds:.0f}",
            ", ".join(f"{n} {kind}" for kind, n in run.incidents.items()) or "none",
        )
        for run in runs
    ]
    lines = text_table([head, *rows], sys.maxsize)
    bare, guarded = runs[0], runs[-1]
    ended = f"ended at a loss of {bare.final_loss:.2f}"
    if math.isnan(bare.final_loss):
        ended = f"failed after {bare.survived} steps"
    lines += [
        "",
        f"The bare run {ended}; "
        f"the guarded one ended at a loss of {guarded.final_loss:.2f} nats a character.",
        f"Logs: {logdir}. Next steps:",
        f"    {shell_command('tensorboard')} --logdir {logdir}",
        f"    {shell_command('lightning-gradguard')} report {logdir}",
    ]
    return "\n".join(["", *lines])


class _Losses(pl.Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.values.append(float(outputs["loss"]))
