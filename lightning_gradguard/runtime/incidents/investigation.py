"""Examines skipped steps, within a budget: the origin of the fault, and a dossier."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.optim import Optimizer

from lightning_gradguard.core.forensics import (
    Origin,
    OutOfRange,
    advice_on_decay,
    advice_on_schedules,
    corrupted_buffer,
    or_bad_input,
    origin_beyond_updates,
    origin_in_epsilon,
    origin_in_learning_rate,
    origin_in_optimizer_step,
    origin_in_weights,
    origin_of_exception,
    out_of_range_elements,
    parts_of,
)
from lightning_gradguard.core.incidents import Cause, first_names, label
from lightning_gradguard.core.remedies import Present
from lightning_gradguard.core.snapshots import Snapshot, any_nonfinite, preserve_state, preserve_weights
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.distributed import gather_objects, world_size
from lightning_gradguard.runtime.incidents.dataset_indices import behind_subsets
from lightning_gradguard.runtime.incidents.dossier import Dossier, versions, write_dossier
from lightning_gradguard.runtime.incidents.lost_batches import sample_ids
from lightning_gradguard.runtime.incidents.replay import SeenBatch, obstacle, replay, without_logging
from lightning_gradguard.runtime.lightning_packages import FRAMEWORKS
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.steps.skipped_hooks import hooks_on_gradients
from lightning_gradguard.runtime.treatment.module import changes_made

#: Causes that exclude few others; a rank whose batch is finite reveals nothing of one whose step raised.
_VAGUE = {"unknown": 1, "transient": 2}
#: Hooks of the module that may have made a bad batch.
_HOOKS = ("on_after_batch_transfer", "on_before_batch_transfer")


@dataclass(frozen=True)
class Result:
    """The origin of a nonfinite value, and the folder of its dossier, relative to that of the run."""

    origin: Origin
    dossier: str = ""


class Investigation:
    """Examines the first skipped step of an episode; later ones have the same cause.

    Attributes:
        examined: Episodes examined so far.
        found: The causes that were found, with the last origin of each.
        cause: Cause of the running episode; `None` outside of one, or if it was not examined.
        in_episode: True from a skipped step to the next good one.
        last: What the last examination has found, as the end of a sentence; empty before one.
        largest_norm: Of the gradients in accepted steps.
    """

    def __init__(self, max_dossiers: int, megabytes: float) -> None:
        self.examined = 0
        self.found: dict[Cause, Origin] = {}
        self._max_dossiers = max_dossiers
        self._megabytes = megabytes
        self.cause: Cause | None = None
        self.in_episode = False
        self.last = ""
        self.largest_norm = 0.0

    @property
    def likely_cause(self) -> Cause | None:
        """Cause of the running episode; once the budget is used up, that of all before if they had one."""
        is_used_up = self.examined >= self._max_dossiers and len(self.found) == 1
        return next(iter(self.found)) if self.cause is None and is_used_up else self.cause

    def end_episode(self) -> None:
        """Called after a good step: the next skipped one begins an episode."""
        self.cause = None
        self.in_episode = False

    def facts_unexamined(self, present: Collection[Present]) -> dict[str, Any]:
        """Returns the facts of a skipped step that was not examined: why, and what is known of others."""
        if self.cause is None and self.examined >= self._max_dossiers:
            number = f"NaNRollback(max_dossiers={self._max_dossiers})"
            why = f"Not examined: {number} is used up; raise it to have more steps of a run examined."
            why += f" The last one{self.last}" if self.last else ""
            return {"examined": False, "detail": why, "advice": why}
        remedy = self.found[self.cause].remedy(present) if self.cause else ""
        facts: dict[str, Any] = {"examined": False, "detail": "Not examined: it follows a skipped step."}
        if self.cause and self.cause not in _VAGUE:
            facts["where"] = ()  # it has the place of the step that it follows, not that of its gradients
        return {**facts, "advice": remedy} if remedy else facts

    def scan_weights(self, trainer: pl.Trainer, snapshot: Snapshot) -> Origin | None:
        """Finds weights out of range of a snapshot's, if any rank has some, without a replay. Collective."""
        out_of_range = _out_of_range(trainer, snapshot)
        origins = gather_objects(
            _in_weights(trainer, out_of_range, snapshot, self.largest_norm) if out_of_range else None
        )
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
        weights_are_nonfinite: bool,
    ) -> Result | None:
        """Runs the batches of a skipped step again. Collective: called on every rank, with the same result.

        `None` within an episode, or when the budget is used up.
        """
        if self.in_episode or self.examined >= self._max_dossiers:
            self.in_episode = True
            return None
        self.in_episode = True
        self.examined += 1
        if (why_not := obstacle(trainer, pl_module)) is not None:
            origin = Origin("unknown", detail=why_not)
            self.last = _in_words(origin, step)
            return Result(origin)
        out_of_range = _out_of_range(trainer, snapshot)
        origin, seen = _first_origin(trainer, pl_module, window, out_of_range)
        is_finite = weights_are_nonfinite and origin.cause == "transient"
        if out_of_range and (is_finite or origin.cause in ("update_too_large", "corrupted_weights")):
            origin = (
                origin if origin.location else _in_weights(trainer, out_of_range, snapshot, self.largest_norm)
            )
        elif is_finite:
            origin = _in_buffers(pl_module) or origin
        are_large = origin.cause == "update_too_large" and not weights_are_nonfinite
        if any(gather_objects(are_large)):
            healthy = _origin_at_healthy_weights(trainer, pl_module, seen, snapshot)
            origin = healthy if are_large and healthy.cause not in _VAGUE else origin
        origin = _with_samples(trainer, seen, origin)
        origins: list[Origin] = gather_objects(origin)
        rank = min(range(len(origins)), key=lambda r: (_VAGUE.get(origins[r].cause, 0), r))
        path = ""
        if rank == trainer.global_rank:
            path = self._write(
                trainer, folder, lambda: _dossier(trainer, step, origin, seen, out_of_range, snapshot)
            )
        self.cause = origins[rank].cause
        self.found[self.cause] = origins[rank]
        self.last = _in_words(origins[rank], step)
        return Result(origins[rank], gather_objects(path)[rank])

    def examine_exception(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        step: int,
        seen: SeenBatch,
        snapshot: Snapshot | None,
        folder: Path | None,
        error: Exception | None = None,
        *,
        is_certain: bool,
    ) -> Result | None:
        """Runs the batch again whose step has raised. Not collective: other ranks may be elsewhere.

        `None` if the batch cannot be run again, or if nothing is found out about its values and it is not
        certain that the step is at fault.
        """
        if obstacle(trainer, pl_module) is not None:
            return None
        out_of_range = _out_of_range(trainer, snapshot)
        origin = replay(trainer, pl_module, seen, out_of_range)
        if origin.cause in _VAGUE and not is_certain:
            return None
        if origin.cause in _VAGUE and not origin.phase and error is not None:  # it has not raised again
            origin = origin_of_exception(error, None, {}, {}, FRAMEWORKS)
        if out_of_range and origin.cause in ("update_too_large", "corrupted_weights"):
            origin = _in_weights(trainer, out_of_range, snapshot, self.largest_norm)
        origin = _with_samples(trainer, seen, origin)
        path = self._write(
            trainer, folder, lambda: _dossier(trainer, step, origin, seen, out_of_range, snapshot)
        )
        return Result(origin, path)

    def _write(self, trainer: pl.Trainer, folder: Path | None, dossier: Callable[[], Dossier]) -> str:
        """Writes a dossier; returns its folder within that of the run, empty if none was written."""
        if folder is None:
            return ""
        try:
            written = write_dossier(folder / "incidents", dossier(), megabytes=self._megabytes)
        except Exception as error:  # a full disk, or data of an unknown kind: training continues
            console.print_message(trainer, f"no dossier was written: {error}")
            return ""
        return str(written.relative_to(folder))


def scan_batches(trainer: pl.Trainer, batches: Sequence[SeenBatch]) -> Origin | None:
    """Finds rows of finite batches that are far out of range, if any rank has some. Collective."""
    found = []
    for seen in batches:
        origin = or_bad_input(Origin("unknown", detail="The step is finite"), parts_of(seen.batch))
        found += [_with_samples(trainer, seen, origin)] if origin.cause == "bad_input" else []
    origins: list[Origin | None] = gather_objects(next(iter(found), None))
    return next((origin for origin in origins if origin is not None), None)


def _in_words(origin: Origin, step: int) -> str:
    """Returns what an examination has found, as the end of a sentence."""
    place = origin.location or first_names(1, origin.where)
    found = f"cause: {label(origin.cause)}" + (f", at {place}" if place else "")
    return f" (step {step}): {origin.detail.rstrip('.') if origin.cause == 'unknown' else found}."


def _with_samples(trainer: pl.Trainer, seen: SeenBatch, origin: Origin) -> Origin:
    """Returns the origin with the samples at fault, if they have names, what changed them, and the rank."""
    samples, indices = sample_ids(seen.batch), seen.indices
    named = {
        "sample": [samples[row] for row in origin.rows if row < len(samples)],
        "index in the data set:": [
            behind_subsets(trainer.train_dataloader, indices[row])
            for row in origin.rows
            if row < len(indices)
        ],
    }
    rows = {"row": origin.rows, **named}
    first = [
        f"{name} {', '.join(map(str, ids[:3]))}{' and more' * (len(ids) > 3)}"
        for name, ids in rows.items()
        if ids
    ]
    places = []
    for name, ids in named.items():
        places += [f"{name} {', '.join(map(str, ids))}"] if ids else []
    own = (hook for hook in _HOOKS if lightning_api.overrides(trainer.lightning_module, hook))
    places += [f"as {hook} of the module returned it" for hook in own if origin.cause == "bad_input"][:1]
    places += [f"rank {trainer.global_rank}"] if world_size() > 1 else []
    detail = f"{origin.detail.rstrip('.')} ({', '.join(places)})." if places else origin.detail
    return dataclasses.replace(origin, detail=detail, samples=", ".join(first))


def _first_origin(
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    window: Sequence[SeenBatch],
    out_of_range: dict[str, OutOfRange],
) -> tuple[Origin, SeenBatch]:
    # all of them, on every rank: the step may contain collectives
    found = [(replay(trainer, pl_module, seen, out_of_range), seen) for seen in window]
    return next((pair for pair in found if pair[0].cause != "transient"), found[-1])


def _origin_at_healthy_weights(
    trainer: pl.Trainer, pl_module: pl.LightningModule, seen: SeenBatch, snapshot: Snapshot
) -> Origin:
    """Returns the origin that a batch has at the weights of a snapshot: one that it has there is not theirs.

    Weights become larger in healthy runs, too, as a bias does that begins at 0.
    """
    with preserve_weights(pl_module):
        for _, now, before in snapshot.compare(list(pl_module.named_parameters()), ()):
            now.detach().copy_(before)
        return replay(trainer, pl_module, seen, {})


def _dossier(
    trainer: pl.Trainer,
    step: int,
    origin: Origin,
    seen: SeenBatch,
    out_of_range: dict[str, OutOfRange],
    snapshot: Snapshot | None,
) -> Dossier:
    pl_module = trainer.lightning_module
    scaler = lightning_api.gradient_scaler(trainer)
    named = pl_module.named_parameters()
    compared = [] if snapshot is None else snapshot.compare(named, trainer.optimizers)
    return Dossier(
        origin=origin,
        step=step,
        epoch=trainer.current_epoch,
        batch_idx=seen.batch_idx,
        rank=trainer.global_rank,
        batch=seen.batch,
        rng=seen.rng,
        weights=dict(pl_module.state_dict()),
        precision=str(trainer.precision),
        loss_scale=scaler.get_scale() if scaler is not None else 1.0,
        largest={name: float(before.abs().amax()) for name, _, before in compared if name in out_of_range},
        evaluating=tuple(name for name, module in pl_module.named_modules() if not module.training),
        frozen=tuple(name for name, p in pl_module.named_parameters() if not p.requires_grad),
        configuration=_configuration(trainer, pl_module),
        versions=versions(),
        changes=changes_made(pl_module),
    )


def _out_of_range(trainer: pl.Trainer, snapshot: Snapshot | None) -> dict[str, OutOfRange]:
    if snapshot is None:
        return {}
    named = trainer.lightning_module.named_parameters()
    return out_of_range_elements(snapshot.compare(named, trainer.optimizers))


def _in_weights(
    trainer: pl.Trainer, out_of_range: dict[str, OutOfRange], snapshot: Snapshot | None, largest_norm: float
) -> Origin:
    named = list(trainer.lightning_module.named_parameters())
    healthy = () if snapshot is None else snapshot.compare(named, ())
    schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
    found = origin_in_learning_rate(trainer.optimizers, schedules)
    found = found or origin_in_epsilon(named, trainer.optimizers)
    if found is None:
        module = trainer.lightning_module
        with without_logging(module), preserve_state(module):  # hooks may count, or average weights
            hooks = _hooks_before_step(trainer)
            found = origin_in_optimizer_step(healthy, trainer.optimizers, hooks, FRAMEWORKS)
    found = found or origin_in_weights(out_of_range)
    if found.cause == "update_too_large" and snapshot is not None:
        taken = snapshot.extra_state  # a snapshot of the initial weights alone has none
        steps = trainer.global_step - (taken.step if taken else 0)
        healthy = snapshot.compare(named, ())
        found = origin_beyond_updates(healthy, trainer.optimizers, steps, largest_norm) or found
    if found.cause != "update_too_large":
        return found
    advice, function = advice_on_schedules(schedules)
    advice = advice_on_decay(trainer.optimizers) or advice
    return dataclasses.replace(
        found, advice=advice, location=str(function or ""), code=function.code if function else ""
    )


def _in_buffers(pl_module: pl.LightningModule) -> Origin | None:
    """Returns the origin in a buffer that a scan of the weights has found out of range, too."""
    found = ((name, b) for name, b in pl_module.named_buffers() if bool(any_nonfinite([], [b])))
    return next((corrupted_buffer(name, buffer) for name, buffer in found), None)


def _hooks_before_step(trainer: pl.Trainer) -> dict[str, Callable[[Optimizer], Any]]:
    """Returns the module's own hooks that may write gradients, by name."""
    module = trainer.lightning_module
    clipping = {
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
    }
    return {
        f"{type(module).__name__}.{name}": partial(
            getattr(module, name), **(clipping if name == "configure_gradient_clipping" else {})
        )
        for name in hooks_on_gradients(module)
    }


def _importable(module: str) -> str:
    """Returns the name under which a module can be imported; `__main__` is not one."""
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
