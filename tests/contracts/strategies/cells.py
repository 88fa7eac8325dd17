"""Runs a small training under a strategy and a precision, and records all numbers and decisions.

As a program in a group of processes, it runs every cell of a group and saves the records.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.precision import FSDPPrecision, MixedPrecision
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from lightning_gradguard import (
    AdaptiveGradientClipping,
    ClippingPolicy,
    GlobalNormClipping,
    GradientNormMonitor,
    LearningRateBackoff,
    NaNRollback,
    PercentileClipping,
    PerTensorClipping,
    UnitwiseClipping,
    ZScoreClipping,
    default_callbacks,
)
from lightning_gradguard.core.parameter_names import plain_name
from lightning_gradguard.runtime import distributed
from tests.tasks import plain_loader

STEPS = 24
#: Optimizer steps with a NaN: one that is skipped, and four in a row that lead to a rollback.
NAN = {7, 15, 16, 17, 18}
SPIKE = 12
POLICIES: dict[str, Any] = {
    "z-score": lambda: ZScoreClipping(warmup_steps=4),
    "global norm": lambda: GlobalNormClipping(0.5),
    "percentile": lambda: PercentileClipping(50),
    "unit-wise": lambda: UnitwiseClipping(0.02),
    "per tensor": lambda: PerTensorClipping(warmup_steps=4),
}


@dataclass(frozen=True)
class Cell:
    """The options of a run.

    Args:
        strategy: A key of `strategy`, or `"one process"`.
        precision: As the Trainer calls it, or `"64"` for a module in float64.
        accumulate: Batches in a window.
        manual: True if the module steps its optimizer itself.
        policy: A key of `POLICIES`.
        norm_type: Of the monitor.
        callbacks: All six, only those that watch, or none.
        validates: True for validation some steps before the rollback.
    """

    strategy: str
    precision: str = "64"
    accumulate: int = 1
    manual: bool = False
    policy: str = "z-score"
    norm_type: float = 2.0
    callbacks: Literal["all", "watching", "none"] = "all"
    validates: bool = False

    def __str__(self) -> str:
        mode = "manual" if self.manual else "automatic"
        return (
            f"{self.strategy}, {self.precision}, {mode}, windows of {self.accumulate}, "
            f"{self.policy}, norm {self.norm_type}{', validation' if self.validates else ''}"
        )


@dataclass
class Seen:
    """The record of a run.

    Attributes:
        scalars: Everything logged, by tag and step.
        incidents: Kind, step, batch, action.
        findings: Criterion and module.
        counts: Skips, rollbacks, overflows, and the scale of the learning rate.
        weights: At the end, whole, in float64.
        collectives: The most that the suite added in a step without an incident.
    """

    scalars: dict[str, dict[int, float]] = field(default_factory=dict)
    incidents: list[tuple[Any, ...]] = field(default_factory=list)
    findings: list[tuple[str, str]] = field(default_factory=list)
    counts: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    collectives: int = 0


class Network(pl.LightningModule):
    """Every kind of parameter: cut by rows, by columns, unevenly, not at all, tied, used by one rank only."""

    def __init__(self, cell: Cell) -> None:
        super().__init__()
        self.automatic_optimization = not cell.manual
        self.cell = cell
        torch.manual_seed(0)
        self.enter = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 24)
        self.gain = nn.Parameter(torch.ones(24))
        self.down = nn.Linear(24, 16)
        self.sequence = nn.LayerNorm(16)
        self.tied = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.tied.weight
        self.narrow = nn.Linear(16, 1)
        self.rare = nn.Linear(12, 16)
        self.head = nn.Linear(16, 3)
        nn.init.constant_(self.up.weight, 0.05)  # the fault for the check to find
        if cell.precision == "64":
            self.double()
        self._is_parallel = False

    def configure_model(self) -> None:
        if self._is_parallel or self.cell.strategy not in (
            "FSDP2",
            "tensor parallel",
            "FSDP2 + tensor parallel",
        ):
            return
        self._is_parallel = True
        mesh = self.device_mesh
        assert mesh is not None
        if "tensor" in self.cell.strategy:
            plan = {
                "up": ColwiseParallel(use_local_output=False),
                "down": RowwiseParallel(output_layouts=Shard(1)),
                "sequence": SequenceParallel(),
                "head": ColwiseParallel(output_layouts=Replicate()),
            }
            parallelize_module(self, mesh["tensor_parallel"], plan)
            # the whole weight is on each rank, and its gradient is sharded as the activations are
            self.gain = nn.Parameter(
                distribute_tensor(self.gain.detach(), mesh["tensor_parallel"], [Replicate()])
            )
        if "FSDP2" in self.cell.strategy:
            for layer in (self.up, self.down, self.head):
                fully_shard(layer, mesh=mesh["data_parallel"])
            fully_shard(self, mesh=mesh["data_parallel"])

    def forward(self, inputs: Tensor, is_rare: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.enter(inputs)))
        if bool(is_rare.any()) or self.cell.strategy != "DDP, unused parameters":
            x = x + is_rare * self.rare(inputs)
        x = self.down(torch.tanh(self.up(x)) * self.gain)
        x = self.sequence(x)
        x = x.full_tensor() if hasattr(x, "full_tensor") else x
        x = self.again(torch.tanh(self.tied(x)))
        logits: Tensor = self.head(torch.tanh(x) * self.narrow(x)).mean(1)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, is_rare, target = batch
        loss = nn.functional.cross_entropy(self(inputs, is_rare), target)
        if self.cell.manual:
            optimizer: Any = self.optimizers()
            with optimizer.toggle_model(sync_grad=(batch_idx + 1) % self.cell.accumulate == 0):
                self.manual_backward(loss / self.cell.accumulate)
            if (batch_idx + 1) % self.cell.accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
        return loss

    def train_dataloader(self) -> Any:
        return plain_loader(part_of(all_batches(self.cell), self.cell))  # type: ignore[arg-type]

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self(*batch[:2])

    def val_dataloader(self) -> Any:
        return plain_loader(part_of(all_batches(self.cell), self.cell))  # type: ignore[arg-type]

    def configure_optimizers(self) -> Any:
        # FSDP1's own flat parameters are in `trainer.model` only
        parameters = self.trainer.model.parameters()  # type: ignore[union-attr]
        if self.cell.precision == "64":
            return torch.optim.AdamW(parameters, lr=1e-2)
        return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def all_batches(cell: Cell) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Batches of 16 sequences of 2; the last sequences are NaN in bad steps."""
    generator = torch.Generator().manual_seed(1)
    dtype = {"64": torch.float64, "16-true": torch.float16, "bf16-true": torch.bfloat16}.get(cell.precision)
    data = []
    for index in range(STEPS * cell.accumulate):
        inputs = torch.randn(16, 2, 12, generator=generator)
        is_rare = torch.zeros(16, 1, 1)
        target = torch.randint(3, (16,), generator=generator)
        step, is_last = index // cell.accumulate, (index + 1) % cell.accumulate == 0
        is_rare[12:] = 1.0
        if step == SPIKE:
            inputs *= 20
        if step in NAN and is_last and cell.callbacks == "all":
            inputs[15] = torch.nan
        data.append((inputs.to(dtype), is_rare.to(dtype), target))
    return data


def part_of(data: Sequence[tuple[Tensor, ...]], cell: Cell) -> list[tuple[Tensor, ...]]:
    """Returns the part of every batch that this process trains on."""
    parts = distributed.world_size() // (2 if "tensor" in cell.strategy else 1)
    mine = distributed.rank() // (2 if "tensor" in cell.strategy else 1)
    return [tuple(tensor.chunk(parts)[mine] for tensor in batch) for batch in data]


def strategy(cell: Cell) -> Any:
    """Returns the strategy for the Trainer."""
    world_size = distributed_world_size()
    tensor = 2 if "tensor" in cell.strategy else 1
    return {
        "one process": lambda: "auto",
        "DDP": lambda: DDPStrategy(),
        "DDP, unused parameters": lambda: DDPStrategy(find_unused_parameters=True),
        "DDP, static graph": lambda: DDPStrategy(static_graph=True),
        "DDP, buckets as views": lambda: DDPStrategy(gradient_as_bucket_view=True),
        "DDP, fp16 hook": lambda: DDPStrategy(ddp_comm_hook=fp16_compress_hook),
        "FSDP2": lambda: (OwnStrategy if cell.validates else ModelParallelStrategy)(world_size, 1),
        "FSDP1": lambda: FSDP1(),
        "FSDP1, flat": lambda: FSDP1(use_orig_params=False),
        "FSDP1, SHARD_GRAD_OP": lambda: FSDP1(sharding_strategy="SHARD_GRAD_OP"),
        "FSDP1, NO_SHARD": lambda: FSDP1(sharding_strategy="NO_SHARD"),
        "FSDP1, HYBRID_SHARD": lambda: FSDP1(sharding_strategy="HYBRID_SHARD", process_group="set later"),
        "tensor parallel": lambda: ModelParallelStrategy(1, tensor),
        "FSDP2 + tensor parallel": lambda: ModelParallelStrategy(world_size // tensor, tensor),
    }[cell.strategy]()


class OwnStrategy(ModelParallelStrategy):
    """A user's, of another name."""


def precision(cell: Cell) -> dict[str, Any]:
    """Returns the arguments of the Trainer."""
    is_fsdp1 = cell.strategy.startswith("FSDP1")
    if cell.precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu")
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    if cell.precision == "64" and is_fsdp1:
        plugin = FSDPPrecision("32-true")
        plugin._desired_input_dtype = torch.float64  # else it has everything in float32
        return {"plugins": [plugin]}
    return {} if cell.precision == "64" else {"precision": cell.precision}


class FSDP1(FSDPStrategy):
    """Sets the device on CPUs: Lightning passes none, which torch rejects."""

    def _setup_model(self, model: nn.Module) -> Any:
        assert isinstance(model, Network)
        options = dict(self.kwargs)
        if self.sharding_strategy is ShardingStrategy.HYBRID_SHARD:  # two replicas of half of the ranks each
            del options["process_group"]
            options["device_mesh"] = init_device_mesh("cpu", (2, distributed.world_size() // 2))
        common = {
            "device_id": torch.device("cpu"),
            "sharding_strategy": self.sharding_strategy,
            # "32-true" would compute in float32 what a module has in float64
            "mixed_precision": None if model.cell.precision == "64" else self.mixed_precision_config,
            "cpu_offload": self.cpu_offload,
            **options,
        }
        for name in ("up", "down"):
            setattr(model, name, FullyShardedDataParallel(getattr(model, name), **common))
        return super()._setup_model(FullyShardedDataParallel(model, **common))


def distributed_world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


class Recorder(Logger):
    """Keeps every scalar, on every rank."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        for tag, value in metrics.items():
            self.seen.scalars.setdefault(tag, {})[int(step or 0)] = float(value)


class Listener(pl.Callback):
    """Records incidents, and counts the collectives of the suite in batches without one."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.count = 0
        self.is_quiet = False

    def on_training_incident(self, trainer: pl.Trainer, pl_module: pl.LightningModule, incident: Any) -> None:
        self.is_quiet = False
        self.seen.incidents.append((incident.kind, incident.step, incident.batch_idx, incident.action))

    def on_train_batch_start(self, *args: Any) -> None:
        # the initialization check communicates in the first step
        self.count, self.is_quiet = 0, args[0].global_step > 0

    def on_train_batch_end(self, *args: Any) -> None:
        if self.is_quiet:
            self.seen.collectives = max(self.seen.collectives, self.count)

    def counted(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return getattr(dist, name)(*args, **kwargs)

        return call


def whole_weights(trainer: pl.Trainer) -> AbstractContextManager[Any]:
    """Gathers whole parameters under FSDP1."""
    model = trainer.strategy.model
    if isinstance(model, FullyShardedDataParallel):
        return FullyShardedDataParallel.summon_full_params(model, writeback=False)
    return nullcontext()


COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast")


def run(cell: Cell, folder: Path) -> Seen:
    """One fit, all six callbacks on."""
    seen = Seen()
    module = Network(cell)
    listener = Listener(seen)
    policy: ClippingPolicy = POLICIES[cell.policy]()
    # a rollback for bad data would leave the rate as it is
    rollback = NaNRollback(snapshot_every_n_steps=4, incident_dir=str(folder), max_dossiers=0)
    backoff = LearningRateBackoff(cooldown_steps=2, rewarm_steps=3)
    suite = default_callbacks(
        gradient_norm_monitor=GradientNormMonitor(level="parameter", norm_type=cell.norm_type),
        nan_rollback=rollback,
        adaptive_gradient_clipping=AdaptiveGradientClipping(policy),
        learning_rate_backoff=backoff,
    )
    used = {"all": suite, "watching": suite[:2], "none": []}[cell.callbacks]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=distributed_world_size(),
        strategy=strategy(cell),
        **precision(cell),
        accumulate_grad_batches=1 if cell.manual else cell.accumulate,
        max_epochs=1,
        # right before the first snapshot is due
        val_check_interval=4 * cell.accumulate,
        limit_val_batches=2 if cell.validates else 0,
        logger=Recorder(seen),
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[*used, listener],
    )
    counting = SimpleNamespace(**{**vars(dist), **{name: listener.counted(name) for name in COLLECTIVES}})
    with mock.patch.object(distributed, "dist", counting):
        trainer.fit(module)
    check: Any = next(callback for callback in suite if hasattr(callback, "findings"))
    seen.findings = [(f.criterion, f.module) for f in check.findings]
    seen.counts = [rollback.skips, rollback.rollbacks, rollback.amp_overflows, backoff.scale]
    with whole_weights(trainer):
        seen.weights = {
            plain_name(name): distributed.whole(p.detach()).double().clone()
            for name, p in module.named_parameters()
        }
    return seen


def main(folder: Path, cells: list[Cell]) -> None:
    """Run the cells one after the other in this process group."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for index, cell in enumerate(cells):
        faulthandler.dump_traceback_later(50, exit=True)  # a hang shows where, and ends
        seen = run(cell, folder)
        torch.save(vars(seen), folder / f"{index}.{os.environ['RANK']}.pt")
    dist.barrier()  # a rank that exits early closes the connections of the others
    dist.destroy_process_group()


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    main(directory, torch.load(directory / "cells.pt", weights_only=False))
