"""The callback that keeps the norm of each unit's weights below a bound."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytorch_lightning as pl
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_gradguard.core import arguments
from lightning_gradguard.core.norms import local_shard, project_units_
from lightning_gradguard.core.parameter_names import match_names, plain_name, warn_unmatched
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.lightning_api import Callback
from lightning_gradguard.runtime.optimizer_hooks import after_step


class WeightNormConstraint(Callback):
    """Projects weights after each step so that no unit's norm exceeds a bound: the max-norm constraint.

    A unit is a slice of a weight along `dim`: for `nn.Linear` and convolutions, the incoming weights of one
    output. Weights of a recurrent network that amplify, or a learning rate that is too high, then cannot let
    activations grow without bound. It acts on trainable parameters of two or more dimensions, within each
    update, also under manual optimization and for each of several optimizers. `NaNRollback` skips and rolls
    back exactly, as weights within the bound are not changed by a bit. A step reads and writes these weights
    once more.

    Method: Nitish Srivastava, Geoffrey Hinton, Alex Krizhevsky, Ilya Sutskever and Ruslan Salakhutdinov,
    "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", JMLR 15, 2014, section 5.1, with
    bounds of 3 to 4.

    Args:
        max_norm: Largest L2 norm of a unit.
        dim: Dimension whose slices are the units; 0 for `nn.Linear` and convolutions.
        include: Names of the parameters that are constrained, or of modules that hold them; all if `None`.
        exclude: Names of parameters that are not constrained, such as those of embeddings.

    Raises:
        ValueError: If `max_norm` is not positive, or `dim` not a whole number; in `setup`, under FSDP1, which
            flattens weights; at the start of training, if ranks hold parts of one unit.

    Example:
        >>> from lightning_gradguard import WeightNormConstraint
        >>> constraint = WeightNormConstraint(max_norm=3.0, exclude=["embedding"])
    """

    def __init__(
        self,
        max_norm: float = 3.0,
        dim: int = 0,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.max_norm = arguments.positive("max_norm", max_norm)
        self.dim = arguments.whole_number("dim", dim, at_least=0)
        self.include = None if include is None else arguments.names("include", include)
        self.exclude = arguments.names("exclude", exclude)
        self._handles: list[RemovableHandle] = []

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            lightning_api.reject_flattened_parameters(trainer, type(self).__name__)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Projects the weights that training starts from, and hooks into the optimizers."""
        warn_unmatched("include", self.include, pl_module, trainer.optimizers)
        warn_unmatched("exclude", self.exclude, pl_module, trainer.optimizers)
        constrained = self._constrained(pl_module)
        self._project(constrained)  # so that a skipped first step changes nothing
        for optimizer in trainer.optimizers:
            stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            weights = [parameter for parameter in constrained if parameter in stepped]
            self._handles.append(after_step(optimizer, partial(self._project, weights)))

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._remove_hooks()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._remove_hooks()

    def _constrained(self, pl_module: nn.Module) -> list[nn.Parameter]:
        named = {plain_name(name): p for name, p in pl_module.named_parameters() if p.ndim > max(1, self.dim)}
        names = list(named) if self.include is None else match_names(named, self.include)
        chosen = [name for name in names if name not in match_names(names, self.exclude)]
        for name in chosen:
            self._reject_split_units(name, named[name])
        return [named[name] for name in chosen]

    def _reject_split_units(self, name: str, parameter: nn.Parameter) -> None:
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        if not all(placement.is_replicate() or placement.is_shard(self.dim) for placement in placements):
            raise ValueError(
                f"WeightNormConstraint cannot measure the units of {name!r}: ranks hold parts of them "
                f"({', '.join(map(str, placements))}). Exclude it, or shard it along dim={self.dim}."
            )

    def _project(self, weights: Sequence[nn.Parameter]) -> None:
        for weight in weights:
            project_units_(local_shard(weight.detach()), self.max_norm, self.dim)

    def _remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
