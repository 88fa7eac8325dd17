"""The callback that trains a module with changes of it and of its optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from lightning_gradguard.core.incidents import first_names
from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.runtime.lightning_api import (
    Callback,
    overrides,
    reject_unsupported,
    shards_parameters,
)
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.logging.hyperparameters import Configured, non_defaults
from lightning_gradguard.runtime.treatment.hooks import call_after, stop_calling_after
from lightning_gradguard.runtime.treatment.module import change_as_saved, change_module, load_changed
from lightning_gradguard.runtime.treatment.optimizers import WarmUp, change_optimizers

Module = TypeVar("Module", bound=pl.LightningModule)
#: Hooks of the module that it adds to, until they are called.
_HOOKS = ("setup", "configure_model", "configure_optimizers", "on_load_checkpoint")


class Treatment(Callback, Configured):
    """Changes a module and its optimizers before training, and trains with the changes.

    The module is changed after its `setup` and `configure_model`, before its optimizers are made:
    activations, normalization, residual additions, gated recurrence, initialization. Names of parameters and
    attributes that a change does not concern are as before. The optimizers are changed when
    `configure_optimizers` returns them; a warm-up scales the rate only while they step. A module is changed
    once, however often it is fitted.

    Every checkpoint of a changed module has the changes: a run that is resumed with the callback continues
    exactly, and `Treatment.load_from_checkpoint` returns the changed module. The console shows what was
    changed.

    A change that does not name its `modules` is fitted to the module by running one training batch before
    the fit, without a trace.

    Args:
        changes: Changes of the module, and of kind `learning_rate`, `constant_rate`, `warm_up`,
            `weight_decay` or `epsilon`; as `Change` or as a dictionary of its arguments. `callbacks_of`
            returns the callbacks for others.

    Raises:
        ValueError: If a change is wrong, or is none that this callback makes.

    Example:
        >>> from lightning_gradguard import Change, Treatment
        >>> treatment = Treatment([Change("replace_activation", {"to": "gelu"}), Change("initialize")])
        >>> treatment = Treatment([{"kind": "learning_rate", "arguments": {"scale": 0.1}}])
    """

    def __init__(self, changes: Sequence[Change | dict[str, Any]]) -> None:
        super().__init__()
        self.changes = [c if isinstance(c, Change) else Change(**c) for c in changes]
        shown = ", ".join(change.describe() for change in self.changes)
        self.settings = non_defaults(Treatment, {"changes": shown})
        for change in self.changes:
            if not change.is_of_treatment:
                raise ValueError(
                    f"Treatment does not make {change.describe()}: callbacks_of returns the callbacks for "
                    "clipping and weight_norm, and precision is an argument of the Trainer."
                )
        self._steps: list[int] = []
        self._warm_ups: list[WarmUp] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Prepares to change the module when it has its layers, and the optimizers when they are made."""
        reject_unsupported(trainer, self)
        if shards_parameters(trainer) and any(change.is_of_module for change in self.changes):
            raise MisconfigurationException(
                f"Treatment does not change modules under {type(trainer.strategy).__name__}, which shards "
                "their weights; train with strategy='ddp', or make the changes in the module's code."
            )

        def changes_module(*_: Any) -> None:
            self._change_module(trainer, pl_module)

        def changes_optimizers(configured: Any) -> None:
            self._change_optimizers(trainer, configured)

        def restores(_: Any, checkpoint: dict[str, Any]) -> None:
            change_as_saved(pl_module, checkpoint)

        makes_layers = overrides(pl_module, "configure_model")
        call_after(pl_module, "configure_model" if makes_layers else "setup", changes_module)
        call_after(pl_module, "on_load_checkpoint", restores)
        if stage == "fit":
            call_after(pl_module, "configure_optimizers", changes_optimizers)

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restores hooks of the module that were not called."""
        stop_calling_after(pl_module, *_HOOKS)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stop_calling_after(pl_module, *_HOOKS)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begins the warm-up, or continues it."""
        self._remove_hooks()
        steps = next((change["steps"] for change in self.changes if change.kind == "warm_up"), None)
        if steps is not None:
            done = self._steps or [0] * len(trainer.optimizers)
            pairs = zip(trainer.optimizers, done, strict=True)
            self._warm_ups = [WarmUp(optimizer, steps, n) for optimizer, n in pairs]

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._remove_hooks()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the steps of the warm-up; the changes of the module are in its own part of a checkpoint."""
        self._steps = [warm_up.done for warm_up in self._warm_ups] or self._steps
        return {"steps": list(self._steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = list(state_dict["steps"])
        for warm_up, done in zip(self._warm_ups, self._steps, strict=False):
            warm_up.set_done(done)

    #: A rollback restores them with the weights.
    snapshot_state_dict, load_snapshot_state_dict = state_dict, load_state_dict

    @staticmethod
    def load_from_checkpoint(
        checkpoint_path: str | Path, module_class: type[Module], **arguments: Any
    ) -> Module:
        """Returns the changed module of a checkpoint, with its weights.

        Args:
            checkpoint_path: A checkpoint of a run with this callback.
            module_class: The class of the module, as it is without the changes.
            arguments: Those of `module_class.load_from_checkpoint`.

        Raises:
            ValueError: If the run had no such callback.
        """
        return load_changed(checkpoint_path, module_class, **arguments)

    def _change_module(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        made = change_module(trainer, pl_module, self.changes)
        if made:
            rows = "\n".join(f"  {change.describe()}: {_places(change)}" for change in made)
            console.print_message(trainer, f"Changed the module before training:\n{rows}")

    def _change_optimizers(self, trainer: pl.Trainer, configured: Any) -> None:
        lines = change_optimizers(configured, self.changes)
        lines += [f"warm-up over {c['steps']} steps" for c in self.changes if c.kind == "warm_up"]
        if lines:
            console.print_message(trainer, f"Changed the optimizers: {'; '.join(lines)}")

    def _remove_hooks(self) -> None:
        self.state_dict()
        for warm_up in self._warm_ups:
            warm_up.remove()
        self._warm_ups = []


def _places(change: Change) -> str:
    return first_names(3, change.modules) if change.modules else "fits nothing, and changes nothing"
