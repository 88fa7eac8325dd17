"""Changes of a LightningModule, made once, and read from its checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor

from lightning_gradguard.core.remedies.changes import Change, apply, in_order, resolve
from lightning_gradguard.core.snapshots.preservation import preserve_randomness
from lightning_gradguard.runtime.distributed import broadcast_tensors, gather_objects
from lightning_gradguard.runtime.incidents.replay import training_loss_or_nan, without_logging
from lightning_gradguard.runtime.lightning_api import train_dataloader_of_fit, weight_averages

Module = TypeVar("Module", bound=pl.LightningModule)
#: Attribute of a module that was changed: what was asked for, and what it was resolved to.
_RECORD = "_gradguard_changes"
#: Key of the same in checkpoints.
KEY = "gradguard_changes"


def change_module(
    trainer: pl.Trainer, pl_module: pl.LightningModule, changes: Sequence[Change]
) -> list[Change]:
    """Makes the changes of a module that were not made of it before, the same ones on every rank.

    A change that does not name what it alters is fitted to the module by running a training batch. Without a
    fit, it is left to `change_as_saved`. Returns the changes that were made now.
    """
    asked_for = [change for change in in_order(changes) if change.is_of_module]
    if not asked_for:
        return []
    record = _record(pl_module)
    due = [change for change in asked_for if all(change != asked for asked, _ in record)]
    if trainer.state.fn != TrainerFn.FITTING:
        due = [change for change in due if change.is_resolved and change.alters != "weights"]
    needs_batch = any(not change.is_resolved or change["to"] == "lsuv" for change in due)
    run_loss = _run_of_first_batch(trainer, pl_module) if needs_batch else None
    if run_loss is None and (unfit := [change for change in due if change["to"] == "lsuv"]):
        raise MisconfigurationException(
            f"Treatment cannot make {unfit[0].describe()}, which scales layers on a training batch: none ran "
            "before the fit. to='kaiming', 'xavier' and 'orthogonal' need none."
        )
    made = []
    for change in due:
        found = change if change.is_resolved else resolve(pl_module, change, run_loss)
        resolved = gather_objects(found)[0]
        apply(pl_module, resolved, run_loss, resolved=True)
        record.append((change, resolved))
        made.append(resolved)
    if made:
        broadcast_tensors([*pl_module.parameters(), *pl_module.buffers()])
        averages = {id(average) for average in weight_averages(trainer)}
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if averages & {id(value) for value in vars(callback).values()}:
                callback.setup(trainer, pl_module, "fit")  # it has copied the module as it was
    return made


def changes_made(pl_module: pl.LightningModule) -> list[dict[str, Any]]:
    """Returns the changes of a module as plain data, each as asked for and as made."""
    pairs: list[tuple[Change, Change]] = vars(pl_module).get(_RECORD, [])
    return [{"asked": asked.as_dict(), "made": made.as_dict()} for asked, made in pairs]


def change_as_saved(pl_module: pl.LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Makes the changes that a checkpoint has and the module does not, before its weights are loaded.

    Raises:
        MisconfigurationException: If the module was changed otherwise than that of the checkpoint.
    """
    saved = _saved_changes(checkpoint)
    if not saved and _RECORD not in vars(pl_module):
        return
    record, of_checkpoint = _record(pl_module), [made for _, made in saved]
    for _, made in record:
        if made not in of_checkpoint and made.alters != "weights":
            similar = [change.as_dict() for change in of_checkpoint if change.kind == made.kind]
            raise MisconfigurationException(
                f"Treatment has made the change {made.as_dict()}, and the checkpoint is of a module with "
                f"{similar or 'no change of this kind'}: its weights do not fit. Give Treatment the changes "
                "of the checkpoint, or train from the start."
            )
    for asked, made in saved:
        if all(made != known for _, known in record):
            if made.alters != "weights":  # the checkpoint has the weights
                apply(pl_module, made, resolved=True)
            record.append((asked, made))


def load_changed(checkpoint_path: str | Path, module_class: type[Module], **arguments: Any) -> Module:
    """Returns a module of a checkpoint, changed as it was when that was written."""

    def on_load_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        if KEY not in checkpoint:
            raise ValueError(
                f"{checkpoint_path} is of a module that no Treatment has changed: "
                f"use {module_class.__name__}.load_from_checkpoint."
            )
        change_as_saved(self, checkpoint)
        module_class.on_load_checkpoint(self, checkpoint)

    changed = type(module_class.__name__, (module_class,), {"on_load_checkpoint": on_load_checkpoint})
    module: Module = changed.load_from_checkpoint(checkpoint_path, **arguments)  # type: ignore[attr-defined]
    module.__class__ = module_class
    return module


class _SavesChanges:
    """The hook of a changed module that adds the changes to each of its checkpoints."""

    def __init__(self, pl_module: pl.LightningModule) -> None:
        self._module = pl_module
        self._own = vars(pl_module).get("on_save_checkpoint")

    @property
    def __code__(self) -> Any:
        """The code of `__call__`, which Lightning compares to find that a hook is overridden."""
        return type(self).__call__.__code__

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = changes_made(self._module)
        if self._own is not None:
            self._own(checkpoint)
        else:
            type(self._module).on_save_checkpoint(self._module, checkpoint)


def _record(pl_module: pl.LightningModule) -> list[tuple[Change, Change]]:
    """Returns the list of changes of a module, as asked for and as made, which its checkpoints have too."""
    if _RECORD not in vars(pl_module):
        vars(pl_module)[_RECORD] = []
        vars(pl_module)["on_save_checkpoint"] = _SavesChanges(pl_module)
    record: list[tuple[Change, Change]] = vars(pl_module)[_RECORD]
    return record


def _saved_changes(checkpoint: Mapping[str, Any]) -> list[tuple[Change, Change]]:
    pairs = checkpoint.get(KEY, ())
    return [(Change(**pair["asked"]), Change(**pair["made"])) for pair in pairs]


def _run_of_first_batch(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Callable[[], Tensor] | None:
    """Returns a run of a training batch; `None` if it does not run so early."""
    try:
        batch = _first_batch(train_dataloader_of_fit(trainer), pl_module)

        def run_loss() -> Tensor:
            with without_logging(pl_module):
                return training_loss_or_nan(pl_module, batch, 0)

        resolve(pl_module, Change("standardize_input"), run_loss)
    except Exception as error:
        warnings.warn(
            f"Treatment could not run a training batch before the fit ({type(error).__name__}: {error}); it "
            "changes what lies in an nn.Sequential, and what is named.",
            stacklevel=2,
        )
        return None
    return run_loss


def _first_batch(loader: Any, pl_module: pl.LightningModule) -> Any:
    """Returns a batch where the weights are, and leaves every random number generator as it is."""
    loaders = CombinedLoader(loader, "min_size")
    owners = [owner for x in loaders.flattened for owner in (x, getattr(x, "sampler", None))]
    with preserve_randomness(*owners):
        batch, *_ = next(iter(loaders))
        device = next((parameter.device for parameter in pl_module.parameters()), torch.device("cpu"))
        batch = pl_module.on_before_batch_transfer(batch, 0)
        batch = pl_module.transfer_batch_to_device(batch, device, 0)
        return pl_module.on_after_batch_transfer(batch, 0)
