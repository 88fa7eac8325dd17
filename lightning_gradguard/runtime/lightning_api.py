"""The only module that uses private attributes of Lightning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from pytorch_lightning.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, ShardingStrategy
from torch.optim import LBFGS, Optimizer
from torchmetrics import Metric

from lightning_gradguard.core.norms import FlatShard
from lightning_gradguard.runtime.lightning_packages import callback_base_class, is_instance_by_name

if TYPE_CHECKING:
    from pytorch_lightning import Callback as Callback
else:
    Callback = callback_base_class()

_AVERAGES = re.compile("EMA|SWA|Averag|Polyak")
PACKAGES = {"pytorch_lightning", "lightning"}
_NO_HOOKS = {pl.Callback.__module__, "lightning.pytorch.callbacks.callback"}
#: Optimizers of which one step evaluates the loss several times and updates in between.
REPEATS_CLOSURE = (LBFGS,)
UNSUPPORTED = {
    "DeepSpeedStrategy": (
        "its gradients and master weights live inside the engine; use strategy='ddp' or "
        "ModelParallelStrategy, or DeepSpeed's own `gradient_clipping`"
    ),
    "XLAFSDPStrategy": "flattened shards are not tested with this suite; use strategy='ddp'",
}


def reject_unsupported(trainer: pl.Trainer, callback: Callback) -> None:
    """Raises where the suite would measure or write the wrong tensors, or cannot measure."""
    if trainer.strategy.root_device.type == "mps":
        raise MisconfigurationException(
            f"{type(callback).__name__} does not support MPS, which has no float64 to add norms up in; "
            "use Trainer(accelerator='cpu')."
        )
    if flattens_parameters(trainer):
        rank_zero_warn(
            "lightning_gradguard is tested with FSDP1 on CPUs, and not on a GPU yet; "
            "ModelParallelStrategy (FSDP2) is its successor.",
            category=UserWarning,
        )
    name = type(trainer.strategy).__name__
    if name in UNSUPPORTED:
        raise MisconfigurationException(
            f"{type(callback).__name__} does not support {name}: {UNSUPPORTED[name]}."
        )


def reject_flattened_parameters(trainer: pl.Trainer, who: str) -> None:
    """Raises under FSDP1, which flattens weights."""
    if flattens_parameters(trainer):
        raise MisconfigurationException(
            f"{who} needs the rows of weights, which {type(trainer.strategy).__name__} flattens and cuts "
            "anywhere; use ModelParallelStrategy (FSDP2), or a policy such as PerTensorClipping."
        )


def allows_extra_pass(trainer: pl.Trainer) -> bool:
    """True if the module can run an extra pass, without collectives of the strategy."""
    return type(trainer.strategy).__name__.startswith(("SingleDevice", "DDP", "SingleHPU", "SingleXLA"))


def is_compiled(pl_module: nn.Module) -> bool:
    """True if a part of the module is compiled: hooks would change what it computes."""
    return getattr(pl_module, "_compiler_ctx", None) is not None or any(
        hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        for module in pl_module.modules()
    )


def takes_iterator(pl_module: pl.LightningModule) -> bool:
    """True for a `training_step(self, dataloader_iter)`: hooks get the batch before the one that it takes."""
    return bool(is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True))


def train_dataloader_of_fit(trainer: pl.Trainer) -> Any:
    """Returns the training data of a fit that has not begun."""
    return trainer.fit_loop._data_source.dataloader()


def step_idx(trainer: pl.Trainer) -> int:
    """Returns the number of calls of `training_step` in this epoch before the running one."""
    return int(trainer.fit_loop.epoch_loop.batch_idx)


def batches_that_stepped(trainer: pl.Trainer) -> int:
    """Returns the step on the loggers' horizontal axis, the one that `self.log` uses."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def resumed_batch_idx_offset(trainer: pl.Trainer) -> int:
    """Returns the number to add to `batch_idx` for the rest of the epoch, at the start of a resumed fit.

    Lightning before 2.5 repeats the index of the batch at whose end the checkpoint was written.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.restarting or hasattr(loop, "restarted_on_train_batch_end"):
        return 0
    progress: Any = loop.batch_progress.current
    return int(progress.processed - progress.completed)


def has_weight_averages(trainer: pl.Trainer) -> bool:
    """True if there is a `WeightAveraging` callback."""
    return any(True for _ in _averaging_callbacks(trainer))


def epoch_mean_metrics(trainer: pl.Trainer) -> Mapping[str, Metric]:
    """Returns the metrics in which `self.log(..., on_epoch=True)` accumulates in training, later ones too."""
    results: Mapping[str, Metric] = getattr(trainer.fit_loop.epoch_loop, "_results", {})
    return results


def set_callback_metrics(trainer: pl.Trainer, numbers: Mapping[str, float]) -> None:
    """Sets metrics in `trainer.callback_metrics`, in a hundredth of the time that `self.log` takes."""
    values = {name: torch.tensor(number) for name, number in numbers.items()}
    # what the progress bar shows was logged, and would come back at the next look, after an exception
    for metric in (getattr(trainer, "_results", None) or {}).values():
        if metric.meta.name in values:
            metric._forward_cache = values[metric.meta.name].clone()
    trainer._logger_connector._callback_metrics.update(values)


def evaluation_sums(trainer: pl.Trainer) -> dict[str, Tensor]:
    """Returns what `self.log` has added up of each metric in this validation or test, on the device."""
    results = getattr(trainer, "_results", None) or {}
    metrics = {key: metric for key, metric in results.items() if getattr(metric, "is_tensor", False)}
    return {key: metric.value for key, metric in metrics.items() if isinstance(metric.value, Tensor)}


def evaluation_metrics(trainer: pl.Trainer) -> dict[str, float]:
    """Returns the metrics of a validation or a test, at its end, by the names that callbacks monitor."""
    results: Any = getattr(trainer, "_results", None)
    metrics: dict[str, Any] = {**trainer.callback_metrics} if results is None else {}
    # those of one data loader at a time, as at the end it gives those that are of none
    loaders = [] if results is None else [*{m.meta.dataloader_idx for m in results.values()} - {None}, None]
    for loader in loaders:
        results.dataloader_idx = loader
        metrics |= results.metrics(False)["callback"]
    return {name: float(value) for name, value in metrics.items()}


def attach_for_replay(trainer: pl.Trainer, pl_module: pl.LightningModule, epoch: int) -> None:
    """Attaches a fresh Trainer to a module as if it were fitting it."""
    pl_module.trainer = trainer
    trainer.strategy.connect(pl_module)
    trainer.state.fn = TrainerFn.FITTING
    trainer.training = True
    trainer.fit_loop.epoch_progress.current.processed = epoch  # type: ignore[attr-defined]


def set_global_step(trainer: pl.Trainer, step: int) -> int:
    """Sets `trainer.global_step`; returns what it was."""
    loop: Any = trainer.fit_loop.epoch_loop
    progress = loop.manual_optimization.optim_step_progress
    if trainer.lightning_module.automatic_optimization:
        progress = loop.automatic_optimization.optim_progress.optimizer.step
    before, progress.total.completed = progress.total.completed, step
    return int(before)


def gradient_scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """Returns the GradScaler of 16-bit mixed precision, if there is one."""
    return getattr(trainer.precision_plugin, "scaler", None)


def set_scaler_state(trainer: pl.Trainer, state: dict[str, Any] | None) -> None:
    """Restores the GradScaler's scale and its count of good steps, if there is a state."""
    if state is not None and (scaler := gradient_scaler(trainer)) is not None:
        scaler.load_state_dict(state)


def gradients_are_scaled(trainer: pl.Trainer, optimizer: Optimizer) -> bool:
    """True if gradients still carry the loss scale when the optimizer is about to step.

    A fused optimizer unscales inside its own kernel, so Lightning leaves its gradients scaled.
    """
    unscales_itself = getattr(optimizer, "_step_supports_amp_scaling", False)
    return gradient_scaler(trainer) is not None and bool(unscales_itself)


def scale_of_gradients(trainer: pl.Trainer, optimizer: Optimizer) -> float:
    """Returns the factor that gradients still carry when the optimizer is about to step."""
    scaler = gradient_scaler(trainer)
    return scaler.get_scale() if scaler is not None and gradients_are_scaled(trainer, optimizer) else 1.0


def flattens_parameters(trainer: pl.Trainer) -> bool:
    """True if the strategy is FSDP1."""
    return is_instance_by_name(trainer.strategy, "FSDPStrategy")


def flat_shards(trainer: pl.Trainer) -> dict[Tensor, FlatShard]:
    """Returns the parameters that FSDP1 has flattened and sharded, once it has wrapped the module."""
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
    return flattens_parameters(trainer) or is_instance_by_name(trainer.strategy, "ModelParallelStrategy")


def reshard_parameters(trainer: pl.Trainer) -> None:
    """Reshards the parameters, so that the module holds the tensors that the optimizer steps.

    A forward pass without a backward pass, such as validation, leaves the full parameters in the module:
    copies would be of other tensors, and writes would be lost.
    """
    for unit in _fsdp1_units(trainer):
        # before the first pass there is nothing to reshard, and no memory for it either
        if unit._is_root is not None and unit._handle.uses_sharded_strategy:
            unit._handle.reshard(True)
    if is_instance_by_name(trainer.strategy, "ModelParallelStrategy"):
        for module in trainer.lightning_module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _fsdp1_units(trainer: pl.Trainer) -> list[Any]:
    """Returns the FSDP1 modules that own parameters."""
    if not flattens_parameters(trainer) or trainer.strategy.model is None:
        return []
    units: list[Any] = FullyShardedDataParallel.fsdp_modules(trainer.strategy.model)
    return [unit for unit in units if unit._handle is not None]


def unscaled_losses(
    trainer: pl.Trainer, losses: Sequence[Tensor], scaler: torch.amp.GradScaler | None
) -> list[Tensor]:
    """Returns the losses that a module returned, from those that were differentiated, detached."""
    plain = [loss.float().mean() if loss.ndim else loss.float() for loss in losses]
    if scaler is not None:
        plain = [loss / scaler.get_scale() for loss in plain]
    if (n := trainer.accumulate_grad_batches) > 1 and trainer.lightning_module.automatic_optimization:
        plain = [loss * n for loss in plain]
    return plain


def validates_next(trainer: pl.Trainer, batch_idx: int) -> bool:
    """True if validation follows the running batch; unknown where it is scheduled by time."""
    every = getattr(trainer, "val_check_batch", None) or float("inf")
    n = (batch_idx if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx) + 1
    return bool(n % every == 0 and trainer.enable_validation)


def is_swa_bn_update(trainer: pl.Trainer) -> bool:
    """True in the last pass of `StochasticWeightAveraging`, which only updates BatchNorm statistics."""
    return bool(getattr(trainer.fit_loop, "_skip_backward", False))


class _CheckpointWriter:
    """Takes the place of `trainer.save_checkpoint`, also of one that was replaced before."""

    def __init__(self, trainer: pl.Trainer, act: Callable[[], None]) -> None:
        self.act = act
        self.replaced = vars(trainer).get("save_checkpoint")
        self.write = trainer.save_checkpoint

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.act()
        return self.write(*args, **kwargs)


def call_before_checkpoints(trainer: pl.Trainer, act: Callable[[], None]) -> None:
    """Calls `act` on every rank ahead of each checkpoint that is written while the Trainer fits."""
    stop_calling_before_checkpoints(trainer)  # an exception ended the fit before, without a teardown
    trainer.save_checkpoint = _CheckpointWriter(trainer, act)  # type: ignore[method-assign]


def stop_calling_before_checkpoints(trainer: pl.Trainer) -> None:
    """Restores `trainer.save_checkpoint`."""
    writer = vars(trainer).get("save_checkpoint")
    if isinstance(writer, _CheckpointWriter):
        del trainer.save_checkpoint
        if writer.replaced is not None:
            trainer.save_checkpoint = writer.replaced  # type: ignore[method-assign]


def weight_averages(trainer: pl.Trainer) -> list[nn.Module]:
    """Returns the averaged models that Lightning's `WeightAveraging` callbacks keep."""
    return [average for average in _kept(trainer, "_average_model") if isinstance(average, nn.Module)]


def average_counts(trainer: pl.Trainer) -> list[Tensor]:
    """Returns the numbers of models that `StochasticWeightAveraging` has averaged."""
    return [count for count in _kept(trainer, "n_averaged") if isinstance(count, Tensor)]


def _kept(trainer: pl.Trainer, attribute: str) -> list[Any]:
    return [getattr(callback, attribute, None) for callback in trainer.callbacks]  # type: ignore[attr-defined]


def unknown_averages(trainer: pl.Trainer, before: Callback | None = None) -> list[str]:
    """Names of callbacks, before one in the list, that seem to average weights in a way of their own."""
    known = {id(callback) for callback in _averaging_callbacks(trainer)}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [
        name
        for callback in callbacks[: next((i for i, c in enumerate(callbacks) if c is before), None)]
        if _AVERAGES.search(name := type(callback).__name__)
        and id(callback) not in known
        and _module_of_hook(callback, "on_train_batch_end") not in _NO_HOOKS
    ]


def _epochs_only(original: Any, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
    return step_idx is None and bool(original(step_idx=step_idx, epoch_idx=epoch_idx))


def pause_weight_averages(trainer: pl.Trainer) -> None:
    """Excludes the running step from every `WeightAveraging` callback, in any order of callbacks."""
    for callback in _averaging_callbacks(trainer):
        if "should_update" not in vars(callback):
            callback.should_update = partial(_epochs_only, callback.should_update)


def resume_weight_averages(trainer: pl.Trainer) -> None:
    """Includes steps in `WeightAveraging` callbacks again."""
    for callback in _averaging_callbacks(trainer):
        vars(callback).pop("should_update", None)


def _averaging_callbacks(trainer: pl.Trainer) -> Iterator[Any]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # by name, for a mock has every attribute
        if is_instance_by_name(callback, "WeightAveraging"):
            yield callback


def writes_after_step(pl_module: pl.LightningModule) -> bool:
    """True if the module may write to its weights when a batch has ended."""
    return _module_of_hook(pl_module, "on_train_batch_end").split(".")[0] not in PACKAGES


def _module_of_hook(owner: Any, hook: str) -> str:
    """Returns the Python module that defines a hook; that of the class if hooks are made up, as by a mock."""
    defined = getattr(type(owner), hook, None)
    return getattr(defined, "__module__", None) or type(owner).__module__


def gradients_used_after_hook(trainer: pl.Trainer) -> bool:
    """True if other code than the suite reads or writes gradients ahead of the update."""
    owners = [trainer.lightning_module, *trainer.callbacks]  # type: ignore[attr-defined]
    packages = {_module_of_hook(owner, "on_before_optimizer_step").split(".")[0] for owner in owners}
    return bool(
        trainer.gradient_clip_val
        or gradient_scaler(trainer) is not None
        or overrides(trainer.lightning_module, "configure_gradient_clipping")
        or packages - PACKAGES - {__name__.split(".")[0]}
    )


def overrides(pl_module: pl.LightningModule, hook: str) -> bool:
    """True if the module, or its class, overrides a hook, such as `configure_gradient_clipping`."""
    return hook in vars(pl_module) or getattr(type(pl_module), hook).__module__.split(".")[0] not in PACKAGES


def is_plain_logger(logger: Any) -> bool:
    """True for a logger of a class of Lightning's own that puts no prefix before names."""
    return type(logger).__module__.split(".")[0] in PACKAGES and not logger._prefix


def train_iterator(trainer: pl.Trainer) -> Any:
    """Returns the iterator of the one loader that training draws from; `None` if there are several."""
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    iterators = getattr(getattr(combined, "_iterator", None), "iterators", [])
    return iterators[0] if len(iterators) == 1 else None


def batch_on_device(trainer: pl.Trainer, batch: Any) -> Any:
    """Returns a batch from the loader as `training_step` gets it: hooks, precision and device applied."""
    batch = trainer.precision_plugin.convert_input(batch)
    if (apply := getattr(trainer.lightning_module, "_on_before_batch_transfer", None)) is not None:
        batch = apply(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)
