"""Runs a guarded training with one fault, and its twin that never sees the batches the first one lost."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

from benchmarks.faults.classes import FAULTS
from benchmarks.faults.injection import OF_DATA, OF_STATE, Fault, corrupted
from benchmarks.faults.tasks import MODELS, Batch, Task, batches
from benchmarks.quiet_trainer import QUIET
from benchmarks.records import read_records
from lightning_gradguard import NaNRollback, default_callbacks
from lightning_gradguard.runtime.lightning_api import gradient_scaler, unscaled_losses

EPOCHS = 2
BATCHES = 60
#: After so long without an answer from another rank, a run counts as hanging.
HANG = timedelta(seconds=60)
#: Values of `NaNRollback(check=...)`.
CHECKS = ("exact", "deferred")


@dataclass(frozen=True)
class Case:
    """A run of the campaign.

    Args:
        kind: Of fault, a key of `FAULTS`; empty for none.
        time: When it happens, a key of `TIMES`.
        model: A key of `MODELS`.
        optimizer: A key of `tasks.OPTIMIZERS`.
        precision: As the Trainer names it.
        check: Of `NaNRollback`.
        seed: Of what chance decides.
        ranks: Processes.
    """

    kind: str
    time: str
    model: str
    optimizer: str
    precision: str
    check: str
    seed: int
    ranks: int = 1

    @property
    def accumulate(self) -> int:
        """Batches in a step."""
        return 2 if self.time == "accumulation" else 1

    @property
    def when(self) -> tuple[int, int]:
        """Epoch and batch of the fault."""
        if self.time == "first step":
            return 0, 1 if self.kind in OF_STATE else 0
        if self.time == "accumulation":
            # gradients are complete with the second batch of the two
            return 1, 11 if "gradient" in self.kind else 10 + self.seed % 2
        if self.time == "resume":
            return 1, 1 if self.kind in OF_STATE else 0
        return {"warm-up": (0, 12), "steady": (1, 10), "last batch": (0, BATCHES - 1)}[self.time]


@dataclass
class Outcome:
    """The outcome of a run.

    Args:
        case: The run.
        survived: True if it ended by itself with finite state, and learned.
        error: The exception that ended it, if any.
        ranks_equal: True if all ranks ended with the same weights and optimizer state.
        equal: True if it ended bit for bit as its twin; `None` where that is not defined.
        causes: Causes of the incidents.
        incidents: Kinds of the incidents, in order.
        lost: Batches whose update is not in the weights.
        recovered_after: Batches from the fault until the loss had recovered; `None` for never.
        seconds: Duration of the run.
        score: On held-out data, less is better.
        best_score: That of the same run without a fault.
    """

    case: Case
    survived: bool
    error: str
    ranks_equal: bool
    equal: bool | None
    causes: list[str]
    incidents: list[str]
    lost: int
    recovered_after: int | None
    seconds: float
    score: float
    best_score: float

    @property
    def named(self) -> bool | None:
        """True if the right cause was named; `None` if there was none to name."""
        wanted = FAULTS[self.case.kind].cause
        if not wanted or not set(self.incidents) - {"lost_batch"}:
            return None
        return bool(self.causes) and self.causes[0] == wanted

    def to_json(self) -> str:
        """Writes the outcome in one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Outcome:
        """Reads a line of `to_json`."""
        record = json.loads(line)
        return cls(**{**record, "case": Case(**record["case"])})


class Epochs:
    """Gives each epoch a list of batches of its own.

    Args:
        module: Its Trainer has the epoch.
        epochs: The batches of each.
        first: The epoch that training begins with; a Trainer that resumes fetches before it has set its own.
    """

    def __init__(self, module: Task, epochs: Sequence[Sequence[Batch]], first: int) -> None:
        self._module = module
        self._epochs = epochs
        self._first = first

    def __iter__(self) -> Iterator[Batch]:
        epoch = max(self._module.trainer.current_epoch, self._first)
        yield from self._epochs[min(epoch, EPOCHS - 1)]


class Losses(pl.Callback):
    """Records the loss of every batch, in the order of training."""

    def __init__(self) -> None:
        self.seen: list[tuple[tuple[int, int], float]] = []
        self._running: list[float] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        (plain,) = unscaled_losses(trainer, [loss.detach()], gradient_scaler(trainer))
        self._running.append(float(plain))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        running, self._running = self._running, []
        self.seen.append(((trainer.current_epoch, batch_idx), sum(running) / max(len(running), 1)))


def quietly(act: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function without any output."""
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "pytorch_lightning.utilities.rank_zero", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return act(*arguments)


def guards(case: Case) -> list[pl.Callback]:
    """The suite as the campaign uses it: without backoff, which changes the following steps by design."""
    rollback = NaNRollback(
        check=case.check,  # type: ignore[arg-type]
        snapshot_every_n_steps=20,
        skip_invalid_batches=case.kind != "" and FAULTS[case.kind].skips_invalid_batches,
        restore_rng=True,
        rewind_schedulers=True,
    )
    return default_callbacks(nan_rollback=rollback, learning_rate_backoff=None)


def fit(
    case: Case, data: Sequence[Sequence[Batch]], folder: Path, callbacks: Any, **arguments: Any
) -> tuple[Task, pl.Trainer]:
    """Trains a fresh network, with a resume after the first epoch if the case has one.

    Args:
        case: The run.
        data: The batches of each epoch.
        folder: For all files.
        callbacks: Called for each of the fits; returns their callbacks.
        **arguments: Of the Trainer.
    """
    checkpoint = None
    first = 0
    for until in (1, EPOCHS) if case.time == "resume" else (EPOCHS,):
        module = MODELS[case.model](case.optimizer, case.seed)
        keep = ModelCheckpoint(folder, save_last=True)
        own = {} if case.model == "GAN" else {"accumulate_grad_batches": case.accumulate}
        precise: dict[str, Any] = {"precision": case.precision}
        if case.precision == "16-mixed":
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            precise = {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}
        trainer = pl.Trainer(
            max_epochs=until,
            default_root_dir=folder,
            callbacks=[*callbacks(), *([keep] if case.time == "resume" else [])],
            devices=case.ranks,
            strategy="auto" if case.ranks == 1 else DDPStrategy(timeout=HANG),
            **{**QUIET, "enable_checkpointing": case.time == "resume", **own, **precise, **arguments},
        )
        torch.manual_seed(case.seed)
        trainer.fit(module, Epochs(module, data, first), ckpt_path=checkpoint)
        checkpoint, first = str(folder / "last.ckpt"), until
    return module, trainer


def state(module: Task, trainer: pl.Trainer) -> list[Tensor]:
    """Everything that training has left in memory: weights, buffers, optimizer state."""
    own = [
        value for optimizer in trainer.optimizers for s in optimizer.state.values() for value in s.values()
    ]
    return [*module.parameters(), *module.buffers(), *(v for v in own if isinstance(v, Tensor))]


def epochs_of(case: Case, rank: int) -> list[list[Batch]]:
    """The data of a rank, with the fault in that of the last rank if it is one of the data."""
    data = [batches(BATCHES, seed=100 * case.seed + 10 * rank + epoch) for epoch in range(EPOCHS)]
    if case.kind in OF_DATA and rank == case.ranks - 1:
        epoch, index = case.when
        data[epoch][index] = corrupted(data[epoch][index], case.kind)
    return data


def play(case: Case, rank: int = 0) -> Outcome:
    """Runs a case, and its twin where there is one. With several ranks, called on each of them.

    Args:
        case: The run.
        rank: Of this process.
    """
    folder = Path(_same_everywhere(case, tempfile.mkdtemp(prefix="gradguard-")))
    fault = Fault(case.kind, *case.when, seed=case.seed, rank=case.ranks - 1)
    losses = Losses()
    data = epochs_of(case, rank)
    error = ""
    start = time.perf_counter()
    try:
        module, trainer = fit(case, data, folder, lambda: [fault, losses, *guards(case)])
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"[:300]
    seconds = time.perf_counter() - start
    untrained, best = reference(replace(case, kind="", check="exact"), rank)
    incidents = read_records(folder / "incidents.jsonl")
    lost = {(r["epoch"], r["batch_idx"]) for r in read_records(folder / f"lost_batches.rank{rank}.jsonl")}
    score, equal, sane, ranks_equal = math.nan, None, False, True
    if not error:
        sane = all(bool(torch.isfinite(tensor).all()) for tensor in state(module, trainer))
        if case.ranks > 1:
            ranks_equal = _same_on_ranks(module, trainer)
        score = module.eval().score(held_out())
        if is_defined(case, [r["kind"] for r in incidents], lost):
            twin_data = [
                [b for i, b in enumerate(epoch) if (e, i) not in lost] for e, epoch in enumerate(data)
            ]
            nothing = folder / "twin"
            twin, twin_trainer = fit(case, twin_data, nothing, lambda: guards(case))
            pairs = zip(state(module, trainer), state(twin, twin_trainer), strict=True)
            equal = all(torch.equal(one, two) for one, two in pairs)
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(
        case=case,
        survived=not error and sane and score <= (untrained + best) / 2,
        error=error,
        ranks_equal=ranks_equal,
        equal=equal,
        causes=[r["cause"] for r in incidents if r["cause"]],
        incidents=[r["kind"] for r in incidents],
        lost=len(lost),
        recovered_after=recovered_after(losses.seen, case.when),
        seconds=seconds,
        score=score,
        best_score=best,
    )


def is_defined(case: Case, incidents: Sequence[str], lost: set[tuple[int, int]]) -> bool:
    """True if the run has a twin without the lost batches.

    It has none under manual optimization with two optimizers, where one step of a batch may be committed; if
    no batch is lost; if a GradScaler skips; or if a fault of the state is not undone.
    """
    is_undone = case.kind in OF_DATA or "gradient" in case.kind
    is_undone |= not {"rollback", "unequal_learning_rates"}.isdisjoint(incidents)
    return case.model != "GAN" and bool(lost) and is_undone


def recovered_after(seen: Sequence[tuple[tuple[int, int], float]], when: tuple[int, int]) -> int | None:
    """Batches from the fault until the loss is at most 1.5 times that of the ten batches before."""
    at = next((i for i, (place, _) in enumerate(seen) if place == when), None)
    if at is None:
        return None
    before = [loss for _, loss in seen[max(at - 10, 0) : at]] or [loss for _, loss in seen[at + 1 : at + 2]]
    level = 1.5 * median(before) if before else math.inf
    return next((i for i, (_, loss) in enumerate(seen[at + 1 :], 1) if loss <= level), None)


@cache
def held_out() -> Batch:
    """Data that no run trains on."""
    parts = batches(30, seed=12345)
    joined = {key: torch.cat([part[key] for part in parts]) for key in ("x", "y", "hidden")}
    return {**joined, "bugs": parts[0]["bugs"]}


@cache
def reference(case: Case, rank: int) -> tuple[float, float]:
    """Scores of the untrained network, and of one that was trained without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        module, _ = fit(case, epochs_of(case, rank), Path(folder), list)
    untrained = MODELS[case.model](case.optimizer, case.seed)
    return untrained.eval().score(held_out()), module.eval().score(held_out())


def _same_everywhere(case: Case, value: str) -> str:
    """The value of rank 0."""
    if case.ranks == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _same_on_ranks(module: Task, trainer: pl.Trainer) -> bool:
    """True if weights and optimizer state are bit for bit those of rank 0; statistics differ by rank."""
    own = [tensor.detach().cpu() for tensor in state(module, trainer)]
    buffers = {id(buffer) for buffer in module.buffers()}
    own = [t for t, live in zip(own, state(module, trainer), strict=True) if id(live) not in buffers]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    return all(torch.equal(a, b) for other in everyone for a, b in zip(everyone[0], other, strict=True))
