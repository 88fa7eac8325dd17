"""The only door to Lightning's private attributes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache, partial, wraps
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.optim import LBFGS, Optimizer
from torchmetrics import Metric

from lightning_gradguard.core.norms import FlatShard
from lightning_gradguard.runtime.lightning_packages import callback_base_class

if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
else:
    Callback = callback_base_class()

_AVERAGES = re.compile("EMA|SWA|Averag|Polyak")
_PACKAGES = {"pytorch_lightning", "lightning"}
_NO_HOOKS = {pl.Callback.__module__, "lightning.pytorch.callbacks.callback"}
UNSUPPORTED = {
    "DeepSpeedStrategy": (
        "its gradients and master weights live inside the engine; use strategy='ddp' or "
        "ModelParallelStrategy, or DeepSpeed's own `gradient_clipping`"
    ),
    "XLAFSDPStrategy": "flattened shards have not been proven with this suite; use strategy='ddp'",
}


def reject_unsupported(trainer: pl.Trainer, callback: Callback) -> None:
    """Raise where the suite would measure or write the wrong tensors, or could not measure at all.

    Args:
        trainer: The Trainer whose strategy and device are looked at.
        callback: Who asks; named in the message.

    Raises:
        MisconfigurationException: If the strategy or the device is one that is refused.
    """
    if trainer.strategy.root_device.type == "mps":
        raise MisconfigurationException(
            f"{type(callback).__name__} does not support MPS, which has no float64 to add norms up in; "
            "use Trainer(accelerator='cpu')."
        )
    if flattens_parameters(trainer):
        rank_zero_warn(
            "lightning_gradguard was proven with FSDP1 on CPUs, and has not been run with it on a GPU yet; "
            "ModelParallelStrategy (FSDP2) is its successor.",
            category=UserWarning,
        )
    name = type(trainer.strategy).__name__
    if name in UNSUPPORTED:
        raise MisconfigurationException(
            f"{type(callback).__name__} does not support {name}: {UNSUPPORTED[name]}."
        )


def reject_flattened_parameters(trainer: pl.Trainer, who: str) -> None:
    """Raise under FSDP1, on behalf of who needs the shapes of weights.

    Raises:
        MisconfigurationException: If the strategy is FSDP1.
    """
    if flattens_parameters(trainer):
        raise MisconfigurationException(
            f"{who} needs the rows of weights, which {type(trainer.strategy).__name__} flattens and cuts "
            "anywhere; use ModelParallelStrategy (FSDP2), or a policy such as PerTensorClipping."
        )


def allows_extra_pass(trainer: pl.Trainer) -> bool:
    """Whether a pass through the module, besides that of training, is nobody else's business."""
    return type(trainer.strategy).__name__.startswith(("SingleDevice", "DDP", "SingleHPU", "SingleXLA"))


def batches_that_stepped(trainer: pl.Trainer) -> int:
    """The step on the loggers' horizontal axis, the one that `self.log` uses."""
    epoch_loop = trainer.fit_loop.epoch_loop
    return int(getattr(epoch_loop, "_batches_that_stepped", trainer.global_step))


def resumed_batch_idx_offset(trainer: pl.Trainer) -> int:
    """By how much `batch_idx` is too low for the rest of the epoch, at the start of a resumed fit.

    Lightning before 2.5 tells the place of the batch at whose end the checkpoint was written once more.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.restarting or hasattr(loop, "restarted_on_train_batch_end"):
        return 0
    progress: Any = loop.batch_progress.current
    return int(progress.processed - progress.completed)


def epoch_mean_metrics(trainer: pl.Trainer) -> list[Metric]:
    """What `self.log(..., on_epoch=True)` accumulates during training, one metric for each key."""
    results = getattr(trainer.fit_loop.epoch_loop, "_results", None)
    return [] if results is None else list(results.values())


def attach_for_replay(trainer: pl.Trainer, pl_module: pl.LightningModule, *, step: int, epoch: int) -> None:
    """Let a Trainer that has run nothing answer its module as if it were fitting it.

    Args:
        trainer: A fresh Trainer.
        pl_module: Asks for `self.trainer`, `self.global_step` and the like.
        step: What `trainer.global_step` shall be.
        epoch: What `trainer.current_epoch` shall be.
    """
    pl_module.trainer = trainer
    trainer.strategy.connect(pl_module)
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True
    loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.epoch_progress.current.processed = epoch  # type: ignore[attr-defined]
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step
    loop.manual_optimization.optim_step_progress.total.completed = step


def gradient_scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """The GradScaler of 16-bit mixed precision, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def set_scaler_state(trainer: pl.Trainer, state: dict[str, Any]) -> None:
    """Put the GradScaler's scale, and its count of good steps, back to what its `state_dict` said."""
    if (scaler := gradient_scaler(trainer)) is not None:
        scaler.load_state_dict(state)


def gradients_are_scaled(trainer: pl.Trainer, optimizer: Optimizer) -> bool:
    """Whether gradients still carry the loss scale when the optimizer is about to step.

    A fused optimizer unscales inside its own kernel, so Lightning leaves its gradients scaled.
    """
    return gradient_scaler(trainer) is not None and bool(
        getattr(optimizer, "_step_supports_amp_scaling", False)
    )


def scale_of_gradients(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """By how much gradients are too large when the optimizer is about to step."""
    scaler = gradient_scaler(trainer)
    return scaler.get_scale() if scaler is not None and gradients_are_scaled(trainer, optimizer) else 1.0


def flattens_parameters(trainer: pl.Trainer) -> bool:
    """Whether the strategy is FSDP1."""
    return _is_strategy(trainer, "FSDPStrategy")


def flat_shards(trainer: pl.Trainer) -> dict[Tensor, FlatShard]:
    """The parameters that FSDP1 has flattened and cut, once it has wrapped the module."""
    found: dict[Tensor, FlatShard] = {}
    for unit in _fsdp1_units(trainer):
        whole = unit.sharding_strategy is ShardingStrategy.NO_SHARD
        pieces = 1 if whole else unit.process_group.size()
        flat = unit._handle.flat_param
        if flat._params is None:  # use_orig_params=False: layers in one, and none of them a vector
            found[flat] = FlatShard(pieces, ndim=2)
        else:
            shapes = zip(flat._params, flat._shapes, strict=True)
            found |= {parameter: FlatShard(pieces, len(shape)) for parameter, shape in shapes}
    return found


def shards_parameters(trainer: pl.Trainer) -> bool:
    """True if the strategy is FSDP1 or FSDP2."""
    return flattens_parameters(trainer) or _is_strategy(trainer, "ModelParallelStrategy")


def reshard_parameters(trainer: pl.Trainer) -> None:
    """Have sharded weights where the optimizer finds them, and nothing else.

    A pass without a backward one, such as validation, leaves the whole weights in the module: what is copied
    then are other tensors, and what is written is lost.
    """
    for unit in _fsdp1_units(trainer):
        # without a pass so far there is nothing to let go of, and no room for it either
        if unit._is_root is not None and unit._handle.uses_sharded_strategy:
            unit._handle.reshard(True)
    if _is_strategy(trainer, "ModelParallelStrategy"):
        for module in trainer.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _is_strategy(trainer: pl.Trainer, name: str) -> bool:
    """Whether the strategy is of this class, of either package, or inherits from it."""
    return name in _names_of(type(trainer.strategy))


@cache
def _names_of(kind: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in kind.__mro__)


def _fsdp1_units(trainer: pl.Trainer) -> list[Any]:
    """The FSDP1 modules that own parameters."""
    if not flattens_parameters(trainer) or trainer.strategy.model is None:
        return []
    units: list[Any] = FullyShardedDataParallel.fsdp_modules(trainer.strategy.model)
    return [unit for unit in units if unit._handle is not None]


def unscaled_loss(trainer: pl.Trainer, loss: Tensor) -> Tensor:
    """The loss that a module returned, from the one that is about to be differentiated."""
    plain = loss.detach().float()
    if plain.ndim:
        plain = plain.mean()
    if (scaler := gradient_scaler(trainer)) is not None:
        plain = plain / scaler.get_scale()
    accumulates = trainer.lightning_module.automatic_optimization and trainer.accumulate_grad_batches > 1
    return plain * trainer.accumulate_grad_batches if accumulates else plain


def calls_closure_repeatedly(optimizer: Optimizer) -> bool:
    """Whether one `optimizer.step` evaluates the loss several times and updates in between."""
    return isinstance(optimizer, LBFGS)


def validates_next(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether validation follows the running batch; not told where it follows the clock."""
    every = getattr(trainer, "val_check_batch", None)
    if not every or every == float("inf") or not trainer.enable_validation:
        return False
    by_epoch = trainer.check_val_every_n_epoch is not None
    return bool(((batch_idx if by_epoch else trainer.fit_loop.total_batch_idx) + 1) % every == 0)


def is_swa_bn_update(trainer: pl.Trainer) -> bool:
    """Whether the running epoch is the last pass of `StochasticWeightAveraging`, for BatchNorm's sake."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


def call_before_checkpoints(trainer: pl.Trainer, act: Callable[[], None]) -> None:
    """Have `act` called on every rank ahead of each checkpoint that is written while the Trainer fits."""

    @wraps(type(trainer).save_checkpoint)
    def save_checkpoint(*args: Any, **kwargs: Any) -> None:
        act()
        type(trainer).save_checkpoint(trainer, *args, **kwargs)

    trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


def stop_calling_before_checkpoints(trainer: pl.Trainer) -> None:
    """Write checkpoints as before."""
    vars(trainer).pop("save_checkpoint", None)


def weight_averages(trainer: pl.Trainer) -> list[nn.Module]:
    """The averaged models that Lightning's `WeightAveraging` callbacks keep."""
    return [
        average
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(average := getattr(callback, "_average_model", None), nn.Module)
    ]


def average_counts(trainer: pl.Trainer) -> list[Tensor]:
    """How many models `StochasticWeightAveraging` has taken in, beside its average."""
    return [
        count
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(count := getattr(callback, "n_averaged", None), Tensor)
    ]


def unknown_averages(trainer: pl.Trainer, before: Callback | None = None) -> list[str]:
    """Names of callbacks, before one in the list, that seem to average weights in a way of their own."""
    known = {id(callback) for callback in _averaging_callbacks(trainer)}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        name
        for callback in (callbacks if before is None else callbacks[: callbacks.index(before)])
        if _AVERAGES.search(name := type(callback).__name__)
        and id(callback) not in known
        and type(callback).on_train_batch_end.__module__ not in _NO_HOOKS
    ]


def _epochs_only(original: Any, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
    return step_idx is None and bool(original(step_idx=step_idx, epoch_idx=epoch_idx))


def pause_weight_averages(trainer: pl.Trainer) -> None:
    """Keep the running step out of every `WeightAveraging` callback, wherever it stands in the list."""
    for callback in _averaging_callbacks(trainer):
        if "should_update" not in vars(callback):
            callback.should_update = partial(_epochs_only, callback.should_update)


def resume_weight_averages(trainer: pl.Trainer) -> None:
    """Let `WeightAveraging` callbacks see steps again."""
    for callback in _averaging_callbacks(trainer):
        vars(callback).pop("should_update", None)


def _averaging_callbacks(trainer: pl.Trainer) -> Iterator[Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if hasattr(callback, "_average_model") and hasattr(callback, "should_update"):
            yield callback


def writes_after_step(pl_module: pl.LightningModule) -> bool:
    """Whether the module may write to its weights when a batch has ended."""
    return type(pl_module).on_train_batch_end.__module__.split(".")[0] not in _PACKAGES


def gradients_used_after_hook(trainer: pl.Trainer) -> bool:
    """Whether others than the suite look at gradients, or write to them, ahead of the update."""
    module = trainer.lightning_module
    lookers = [module, *trainer.callbacks]  # type: ignore[attr-defined]
    packages = {type(looker).on_before_optimizer_step.__module__.split(".")[0] for looker in lookers}
    return bool(
        trainer.gradient_clip_val
        or gradient_scaler(trainer) is not None
        or overrides_gradient_clipping(module)
        or packages - _PACKAGES - {__name__.split(".")[0]}
    )


def overrides_gradient_clipping(pl_module: pl.LightningModule) -> bool:
    """Whether the module brings its own `configure_gradient_clipping`."""
    own = type(pl_module).configure_gradient_clipping
    return own.__module__.split(".")[0] not in _PACKAGES
