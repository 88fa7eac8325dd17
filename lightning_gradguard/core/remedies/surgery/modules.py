"""Children and a parameter that a change adds to an existing module, and the hooks that compute with them.

A hook leaves the names of parameters and of attributes as they are, so that the user's code and optimizer
find what they look for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_gradguard.core.remedies.surgery.data_flow import state_of

#: Names of the children, and of the parameter of a residual addition.
NORMALIZATION = "added_normalization"
RESIDUAL = "added_residual"
STANDARDIZATION = "added_standardization"
#: Batches by which inputs are standardized.
MEASURED_BATCHES = 100


class ResidualAddition:
    """Adds the input of a block to its output, with two hooks: `x + weight * f(x)`; of a cell, its state.

    The weight is a parameter of the block's last module, as a child would be one more step of an
    `nn.Sequential`.

    References:
        Bachlechner, Majumder, Mao, Cottrell, McAuley, ReZero is All You Need: Fast Convergence at Large
        Depth, 2020, arXiv:2003.04887.
    """

    def __init__(self, is_cell: bool = False) -> None:
        self._is_cell = is_cell
        self._inputs: tuple[Any, ...] = ()

    def attach(self, first: nn.Module, last: nn.Module, weight: float) -> None:
        """Hooks into the modules that a block begins and ends with."""
        like = next(first.parameters())
        value = torch.full((), weight, dtype=like.dtype, device=like.device)
        last.register_parameter(RESIDUAL, nn.Parameter(value))
        first.register_forward_pre_hook(self._keep)
        last.register_forward_hook(self._add)

    def _keep(self, first: nn.Module, args: tuple[Any, ...]) -> None:
        self._inputs = args if self._is_cell else args[:1]

    def _add(self, last: nn.Module, args: Any, output: Tensor) -> Tensor:
        inputs, self._inputs = state_of(self._inputs, output), ()
        if inputs is None:  # the user's code runs a part of the block
            return output
        added: Tensor = inputs + getattr(last, RESIDUAL) * output
        return added


@dataclass(frozen=True)
class ScaledOutput:
    """Gives `mean + std * output`, with the gradient that standardized targets have: a forward hook.

    A squared error of targets of thousands has gradients a million times as large, which no usual learning
    rate fits.

    Args:
        mean: Of the targets.
        std: Standard deviation of the targets.
    """

    mean: float
    std: float

    def __call__(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Returns the scaled output."""
        # the difference is 0, and has the gradient
        return self.mean + self.std * output.detach() + (output - output.detach()) / self.std


class StandardizedInput(nn.Module):
    """Scales inputs to zero mean and unit variance, by feature, with statistics of the first batches.

    They are those of the training batches so far, until 100 of them; nonfinite batches do not count.

    Args:
        n_features: Size of the dimension of features.
        dim: Dimension of features, from the last: -1, but for convolutions.
        like: A parameter of the layer, for dtype and device.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, n_features: int, dim: int, like: Tensor) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("mean", torch.zeros(n_features, dtype=torch.float32, device=like.device))
        self.register_buffer("variance", torch.ones(n_features, dtype=torch.float32, device=like.device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long, device=like.device))

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the inputs, standardized."""
        features = inputs.detach().movedim(self.dim, -1).reshape(-1, len(self.mean)).float()
        if self.training:
            self._measure(features)
        shape = [1] * inputs.ndim
        shape[self.dim] = -1
        # a feature that is constant has no scale of its own
        scale = torch.where(self.variance > 1e-12 * (1 + self.mean.square()), self.variance, 1.0).rsqrt()
        mean, scale = (statistic.to(torch.float32).view(shape) for statistic in (self.mean, scale))
        return ((inputs - mean) * scale).to(inputs.dtype)

    @torch.no_grad()
    def _measure(self, features: Tensor) -> None:
        """Merges the moments of a batch, without a host synchronization."""
        counts = torch.isfinite(features).all() & (self.batches < MEASURED_BATCHES)
        share = torch.where(counts, 1.0 / (self.batches + 1), 0.0)
        mean = torch.where(counts, features.mean(0), self.mean)
        variance = torch.where(counts, features.var(0, correction=0), self.variance)
        difference = mean - self.mean
        # the first batch replaces the values that the module is made with
        between = torch.where(self.batches > 0, share * (1 - share) * difference.square(), 0.0)
        self.variance.copy_((1 - share) * self.variance + share * variance + between)
        self.mean.add_(share * difference)
        self.batches.add_(counts.long())


def normalize_output(layer: nn.Module, args: Any, output: Tensor) -> Tensor:
    """Normalizes the output of a layer: a forward hook."""
    norm: Any = getattr(layer, NORMALIZATION)
    if isinstance(norm, _BatchNorm) and norm.training and output.numel() == output.shape[1]:
        # one sample has no variance: it is normalized as in evaluation
        return nn.functional.batch_norm(
            output, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps
        )
    normalized: Tensor = norm(output)
    return normalized


def standardize_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Standardizes the first input of a layer: a forward pre-hook."""
    standardize: Any = getattr(layer, STANDARDIZATION)
    return (standardize(args[0]), *args[1:])
