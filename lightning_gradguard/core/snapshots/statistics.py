"""Running variances of normalization that one batch has raised out of proportion."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from operator import methodcaller

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_gradguard.core.snapshots.nonfinite import MAX_MAGNITUDE

#: A batch that raises a running variance by this factor, relative to itself and to the mean of all, is an
#: outlier; healthy runs raise it up to about 100-fold (benchmarks/spikes/variances.py).
JUMP = 1e4
#: In the first batches, in which statistics begin at 1, a row of the batch has to be this many times larger
#: than the median row as well.
OUTLYING_ROW = 1e3
#: Batches after which statistics have settled: they begin at 1, whatever the scale of the data.
SEEN = 10
_VARIANCE = re.compile(r"(^|_)var(iance)?$|^running_std$")


def running_variances(modules: Iterable[nn.Module]) -> list[tuple[nn.Module, str]]:
    """Returns the places of the running variances: the module, and the name of the buffer.

    Those of a normalization of the user's own are beside a mean.
    """
    return [
        (module, name)
        for module in modules
        if any("mean" in name for name in module._buffers)
        for name, buffer in module._buffers.items()
        if _VARIANCE.search(name)
        and buffer is not None
        and not is_lazy(buffer)
        and buffer.is_floating_point()
    ]


def is_out_of_range(statistics: Sequence[Tensor]) -> Tensor:
    """Returns without a host synchronization what `any_nonfinite` does of squares, in a tenth of its time.

    A variance is one: that of inputs of 1e9 is 1e18, and they are normalized. The tensors are of floating
    point, small, dense and not sharded; one of them is not empty.

    Example:
        >>> is_out_of_range([torch.ones(2), torch.tensor([torch.nan])])
        tensor(True)
    """
    largest = torch.linalg.vector_norm(_joined(statistics), math.inf)
    flag: Tensor = ~(largest <= MAX_MAGNITUDE**2)
    return flag


def has_jumped(now: Sequence[Tensor], before: Sequence[Tensor]) -> Tensor:
    """Returns without a host synchronization if a batch was an outlier for running variances.

    There is at least one variance, and none is sharded.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> was = norm.running_var.clone()
        >>> _ = norm(torch.tensor([[0.0], [1e9]]))
        >>> has_jumped([norm.running_var], [was])
        tensor(True)
    """
    after, then = _joined(now), _joined(before)
    usual = torch.maximum(then, then.mean())
    return ((after > JUMP * usual) & (usual > 0)).any()


@torch.no_grad()
def has_outlying_row(tensors: Iterable[Tensor]) -> Tensor:
    """Returns, on the device, if a row of a tensor of a batch is far larger than its median row.

    Example:
        >>> has_outlying_row([torch.tensor([[1.0], [1.0], [1e9]])])
        tensor(True)
    """
    found = []
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.ndim and tensor.numel():
            sizes = tensor.abs().reshape(len(tensor), -1).amax(1).float()
            found.append(sizes.amax() > OUTLYING_ROW * sizes.median())
    return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool)


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Returns all elements as float32, on the device of the first tensor."""
    alike = map(methodcaller("to", tensors[0].device, torch.float32), tensors)
    return torch.cat([*map(Tensor.flatten, alike)])
