"""From a lost batch to what was at fault and a dossier about it, within a budget."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import nn

from lightning_gradguard.core.forensics import Origin, origin_in_weights
from lightning_gradguard.core.incidents import Cause
from lightning_gradguard.core.remedies import advice_for_cause
from lightning_gradguard.core.snapshots import Snapshot
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.distributed import gather_objects, world_size
from lightning_gradguard.runtime.incidents.dossier import Dossier, versions, write_dossier
from lightning_gradguard.runtime.incidents.lost_batches import sample_ids
from lightning_gradguard.runtime.incidents.replay import SeenBatch, replay
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.rollback import trainer_state


@dataclass(frozen=True)
class Result:
    """What an investigation came to.

    Args:
        origin: What was at fault.
        dossier: The folder that was written, within that of the run, or an empty text.
    """

    origin: Origin
    dossier: str = ""


class Investigation:
    """Examines the first lost step of an episode; later ones of it have the same cause.

    Args:
        max_dossiers: How many episodes are examined in a run.
        megabytes: Limit of each dossier.

    Attributes:
        examined: How many episodes were.
        found: The causes that were found, with the tensors or modules at fault.
        cause: Of the running episode, if it is one and was examined.
    """

    def __init__(self, max_dossiers: int, megabytes: float) -> None:
        self.examined = 0
        self.found: dict[Cause, tuple[str, ...]] = {}
        self._max_dossiers = max_dossiers
        self._megabytes = megabytes
        self.cause: Cause | None = None
        self._in_episode = False

    def well(self) -> None:
        """A step was good: the next lost one begins an episode."""
        self.cause = None
        self._in_episode = False

    def advice(self) -> dict[str, str]:
        """What to do about a lost step that was not examined, as far as the episode's first one tells."""
        told = advice_for_cause(self.cause, self.found[self.cause]) if self.cause else ""
        return {"advice": told} if told else {}

    def look_at_weights(self, trainer: pl.Trainer, snapshot: Snapshot) -> Origin | None:
        """What has become of the weights since a snapshot, without a replay. Collective.

        Returns:
            What was found, the same on every rank; `None` if no rank has absurd weights.
        """
        out_of_range = trainer_state.out_of_range(trainer, snapshot)
        origins = gather_objects(origin_in_weights(out_of_range) if out_of_range else None)
        return next((origin for origin in origins if origin is not None), None)

    def examine(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        step: int,
        window: Sequence[SeenBatch],
        snapshot: Snapshot,
        folder: Path | None,
        *,
        weights_are_sick: bool,
    ) -> Result | None:
        """Run the batches of a lost step again. Collective: called on every rank.

        Args:
            trainer: The Trainer that runs.
            pl_module: The module, with weights as the step found them.
            step: `trainer.global_step` when they were served first.
            window: The batches of the step.
            snapshot: From when the run was well.
            folder: Of the run; `None` writes no dossier.
            weights_are_sick: Whether weights are known to be nonfinite, whatever the batch makes of them.

        Returns:
            What was found, the same on every rank; `None` within an episode, or when the budget is used up.
        """
        if self._in_episode or self.examined >= self._max_dossiers:
            self._in_episode = True
            return None
        self._in_episode = True
        self.examined += 1
        if (refusal := _refusal(trainer, pl_module)) is not None:
            return Result(Origin("unknown", detail=refusal))
        out_of_range = trainer_state.out_of_range(trainer, snapshot)
        origin, served = _first_sick(trainer, pl_module, window, out_of_range)
        if weights_are_sick and out_of_range and origin.cause == "transient":
            origin = origin_in_weights(out_of_range)
        origin = dataclasses.replace(origin, detail=_with_whose(trainer, served, origin))
        origins: list[Origin] = gather_objects(origin)
        rank = min(range(len(origins)), key=lambda r: (_VAGUE.get(origins[r].cause, 0), r))
        path = ""
        if rank == trainer.global_rank and folder is not None:
            try:
                dossier = _dossier(trainer, pl_module, step, origin, served, out_of_range, snapshot)
                written = write_dossier(folder / "incidents", dossier, megabytes=self._megabytes)
            except Exception as error:  # a full disk, or data of a kind never seen: training goes on
                console.print_message(trainer, f"gradguard: no dossier was written: {error}")
            else:
                path = str(written.relative_to(folder))
        self.cause = origins[rank].cause
        self.found[self.cause] = origins[rank].where
        return Result(origins[rank], gather_objects(path)[rank])


def _with_whose(trainer: pl.Trainer, served: SeenBatch, origin: Origin) -> str:
    """The detail, with the samples at fault and the rank, as far as batch and ranks say."""
    known = sample_ids(served.batch)
    ids = [known[row] for row in origin.rows if row < len(known)]
    told = [f"sample {', '.join(map(str, ids))}"] if ids else []
    told += [f"rank {trainer.global_rank}"] if world_size() > 1 else []
    return f"{origin.detail.rstrip('.')} ({', '.join(told)})." if told else origin.detail


_VAGUE = {"transient": 1, "unknown": 2}


def _refusal(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str | None:
    if not lightning_api.allows_extra_pass(trainer):
        return f"The batch was not run again: {type(trainer.strategy).__name__} shards the network."
    if world_size() > 1 and any(isinstance(m, nn.SyncBatchNorm) for m in pl_module.modules()):
        return "The batch was not run again: SyncBatchNorm would wait for the other ranks."
    return None


def _first_sick(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    window: Sequence[SeenBatch],
    out_of_range: dict[str, int],
) -> tuple[Origin, SeenBatch]:
    # all of them, on every rank: the step may talk to other ranks
    found = [(replay(trainer, pl_module, served, out_of_range), served) for served in window]
    return next((pair for pair in found if pair[0].cause != "transient"), found[-1])


def _dossier(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    step: int,
    origin: Origin,
    served: SeenBatch,
    out_of_range: dict[str, int],
    snapshot: Snapshot,
) -> Dossier:
    scaler = lightning_api.gradient_scaler(trainer)
    compared = snapshot.compare(pl_module.named_parameters(), trainer.optimizers)
    return Dossier(
        origin=origin,
        step=step,
        epoch=trainer.current_epoch,
        batch_idx=served.batch_idx,
        rank=trainer.global_rank,
        batch=served.batch,
        rng=served.rng,
        weights=dict(pl_module.state_dict()),
        precision=str(trainer.precision),
        loss_scale=scaler.get_scale() if scaler is not None else 1.0,
        largest={name: float(before.abs().amax()) for name, _, before in compared if name in out_of_range},
        evaluating=tuple(name for name, module in pl_module.named_modules() if not module.training),
        frozen=tuple(name for name, p in pl_module.named_parameters() if not p.requires_grad),
        configuration=_configuration(trainer, pl_module),
        versions=versions(),
    )


def _importable(module: str) -> str:
    """The name under which others import a module; a script's own is none of it."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(file).stem if module == "__main__" and file else module


def _configuration(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, str]:
    kind = type(pl_module)
    found: dict[str, Any] = {
        "module": f"{_importable(kind.__module__)}.{kind.__qualname__}",
        "strategy": type(trainer.strategy).__name__,
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": trainer.gradient_clip_val,
        **{f"hparams.{name}": value for name, value in dict(pl_module.hparams).items()},
    }
    for index, optimizer in enumerate(trainer.optimizers):
        settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        found[f"optimizer {index}"] = f"{type(optimizer).__name__} {settings}"
    return {name: str(value)[:500] for name, value in found.items()}
