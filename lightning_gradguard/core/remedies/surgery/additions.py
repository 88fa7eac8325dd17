"""Normalization, residual additions and standardized inputs, added to the modules of a network."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from lightning_gradguard.core.remedies.surgery.data_flow import (
    ACTIVATIONS,
    RECURRENT,
    WEIGHTED,
    DataFlow,
    Layer,
)
from lightning_gradguard.core.remedies.surgery.modules import (
    NORMALIZATION,
    RESIDUAL,
    STANDARDIZATION,
    ResidualAddition,
    ScaledOutput,
    StandardizedInput,
    normalize_output,
    standardize_input,
)

#: Smallest batch whose statistics normalize it.
_SMALLEST_BATCH = 8
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def normalizable(module: nn.Module, flow: DataFlow, names: Collection[str]) -> list[Layer]:
    """Returns layers that an activation follows without a normalization, or those that are named."""
    return [
        layer
        for layer in (flow.named(module, names) if names else flow.weighted())
        if isinstance(layer.module, WEIGHTED)
        and not hasattr(layer.module, NORMALIZATION)
        and (names or (layer.is_hidden and layer.activation))
        and (names or not (layer.is_normalized or layer.is_gate or layer.is_frozen))
    ]


def fitting_norm(layer: Layer) -> str:
    """Returns the normalization that fits a layer: `"batch"`, or `"layer"` without a batch of single samples.

    A small batch, a time axis, and a layer in a recurrence need one that is of each sample alone.
    """
    of_convolution = isinstance(layer.module, _ConvNd)
    is_large = layer.shapes is None or layer.shapes[1][0] >= _SMALLEST_BATCH
    has_time = not of_convolution and layer.shapes is not None and len(layer.shapes[1]) != 2
    return "batch" if is_large and not has_time and not layer.is_recurrent else "layer"


def add_normalizations(module: nn.Module, names: Collection[str], norms: Sequence[str]) -> None:
    """Normalizes the outputs of layers."""
    for name, norm in zip(names, norms, strict=True):
        layer = module.get_submodule(name)
        assert isinstance(layer, WEIGHTED)
        layer.add_module(NORMALIZATION, _norm(layer, norm).train(layer.training))
        layer.register_forward_hook(normalize_output)


def _norm(layer: nn.Linear | _ConvNd, norm: str) -> nn.Module:
    like: dict[str, Any] = {"dtype": layer.weight.dtype, "device": layer.weight.device}
    if isinstance(layer, nn.Linear):
        kind = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
        return kind(layer.out_features, **like)
    if norm == "batch":
        return _BATCH_NORMS[len(layer.kernel_size)](layer.out_channels, **like)
    return nn.GroupNorm(1, layer.out_channels, **like)


def inputs(module: nn.Module, flow: DataFlow, names: Collection[str]) -> list[str]:
    """Returns the layers that get the network's inputs, or those that are named."""
    return [
        layer.name
        for layer in (flow.named(module, names) if names else flow.layers.values())
        if isinstance(layer.module, (*WEIGHTED, *RECURRENT))
        and not hasattr(layer.module, STANDARDIZATION)
        and _features(layer.module)[0] > 0  # 0 for a lazy one that has not run yet
        and (names or (layer.takes_input and not layer.is_frozen))
    ]


def standardize_inputs(module: nn.Module, names: Collection[str]) -> None:
    """Standardizes what layers get, by feature."""
    for name in names:
        layer = module.get_submodule(name)
        size, dim = _features(layer)
        like = next(layer.parameters())
        layer.add_module(STANDARDIZATION, StandardizedInput(size, dim, like).train(layer.training))
        layer.register_forward_pre_hook(standardize_input)


def _features(layer: nn.Module) -> tuple[int, int]:
    """Returns the number of features that a layer takes, and their dimension, from the last."""
    if isinstance(layer, _ConvNd):
        return layer.in_channels, -1 - len(layer.kernel_size)
    assert isinstance(layer, (nn.Linear, *RECURRENT))
    return (layer.in_features if isinstance(layer, nn.Linear) else layer.input_size), -1


def heads(module: nn.Module, flow: DataFlow, names: Collection[str]) -> list[str]:
    """Returns the one layer that gives the network's values, or those that are named."""
    last = [
        layer.name
        for layer in (flow.named(module, names) if names else flow.weighted())
        if isinstance(layer.module, WEIGHTED)
        and (names or not (layer.is_hidden or layer.activation or layer.is_frozen))
    ]
    return last if names or len(last) == 1 else []


def scale_outputs(module: nn.Module, names: Collection[str], mean: float, std: float) -> None:
    """Scales what layers give to the mean and the deviation of the targets."""
    for name in names:
        module.get_submodule(name).register_forward_hook(ScaledOutput(mean, std))


def blocks(module: nn.Module, flow: DataFlow, names: Collection[str]) -> list[str]:
    """Returns blocks of equal input and output shape, as one module or as `first:last` of an `nn.Sequential`.

    The user's cells of a recurrence, which get their state as an argument, are among them, as `cell:cell`.
    The innermost ones: a layer with its activation where an `nn.Sequential` has them, else a module of the
    user's that holds both, else a layer alone, whose input is added before its activation. None that has a
    residual addition, or lies in one, is in a recurrence, or ends with the output.
    """
    if any(":" in name for name in names):
        return list(names)
    found: list[str] = []
    children = {name: child for name, child in module.named_modules() if name}
    for name, child in [("", module), *children.items()]:
        if isinstance(child, nn.Sequential):
            found += _runs(name, child, flow)
    for name, child in reversed(children.items()):
        layer = flow.layers.get(name)
        if layer is None or isinstance(child, (*WEIGHTED, *ACTIVATIONS, *RECURRENT)):
            continue
        has_inner = any(block.startswith(f"{name}.") for block in found)
        if not has_inner and _is_block(layer) and _has_layer_and_activation(name, flow):
            found.append(name)
    cells = [layer for layer in flow.layers.values() if _is_cell(layer)]
    found += [f"{layer.name}:{layer.name}" for layer in cells]
    holds = [block.partition(":")[0] for block in found]
    holds += [n for n, layer in flow.layers.items() if layer.is_residual or hasattr(layer.module, RESIDUAL)]
    for layer in flow.weighted():
        is_alone = not any(f"{layer.name}.".startswith(f"{one}.") for one in holds)
        if is_alone and layer.activation and layer.is_hidden and _is_block(layer):
            found.append(layer.name)
    order = list(flow.layers)
    found.sort(key=lambda block: order.index(block.partition(":")[0]))
    return [block for block in found if not names or block.partition(":")[0] in names or block in names]


def _is_block(layer: Layer) -> bool:
    return (
        layer.keeps_shape
        and not (layer.is_residual or layer.is_gate or layer.overwrites_input or layer.takes_input)
        and not (layer.is_recurrent or layer.is_frozen)
        and not hasattr(layer.module, RESIDUAL)
    )


def _is_cell(layer: Layer) -> bool:
    return layer.is_cell and not (layer.is_residual or layer.is_frozen or hasattr(layer.module, RESIDUAL))


def _has_layer_and_activation(name: str, flow: DataFlow) -> bool:
    inside = [layer for layer in flow.weighted() if layer.name.startswith(f"{name}.")]
    are_hidden = all(layer.is_hidden and not layer.is_recurrent for layer in inside)
    return are_hidden and any(layer.activation and not layer.is_gate for layer in inside)


def _runs(name: str, sequential: nn.Sequential, flow: DataFlow) -> Iterator[str]:
    """Yields layers of equal shapes with what follows them up to the next layer."""
    members = [(f"{name}.{n}".lstrip("."), child) for n, child in sequential.named_children()]
    for i, (first, child) in enumerate(members):
        layer = flow.layers.get(first)
        if not isinstance(child, WEIGHTED) or layer is None or not layer.is_hidden:
            continue
        last = None
        for follower, other in members[i + 1 :]:
            if any(isinstance(m, (*WEIGHTED, *RECURRENT)) for m in other.modules()):
                break
            after = flow.layers.get(follower)
            if after is None or after.calls != layer.calls or not after.keeps_shape:
                break
            if isinstance(other, ACTIVATIONS):
                last = follower
        if last is not None and _is_block(layer) and not hasattr(flow.layers[last].module, RESIDUAL):
            yield f"{first}:{last}"


def add_residuals(module: nn.Module, found: Sequence[str], weight: float | None) -> None:
    """Adds the inputs of blocks to their outputs; the weight of these is `1 / sqrt(n_blocks)` by default."""
    weight = 1 / math.sqrt(max(len(found), 1)) if weight is None else weight
    for block in found:
        first, _, last = block.partition(":")
        opening, closing = module.get_submodule(first), module.get_submodule(last or first)
        ResidualAddition(is_cell=first == last).attach(opening, closing, weight)
