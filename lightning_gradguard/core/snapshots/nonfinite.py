"""A test of many tensors for values that are nonfinite, or will overflow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_gradguard.core.norms import largest_magnitudes, local_shard, stack_small

#: A larger magnitude counts as infinite: a sum of a few of its squares overflows float32. A flipped exponent
#: bit makes almost any weight this large.
MAX_MAGNITUDE = 1e17


@torch.no_grad()
def any_nonfinite(tensors: Iterable[Tensor], squares: Iterable[Tensor] = ()) -> Tensor:
    """Returns without a host synchronization if any element is nonfinite, or too large to be squared.

    Args:
        tensors: Any tensors; those of integers are ignored.
        squares: Further tensors, whose elements may be squares.

    Returns:
        A flag of shape `()`, on the device if any of the tensors is.

    Example:
        >>> any_nonfinite([torch.ones(2), torch.tensor([1.0, torch.inf])])
        tensor(True)
    """
    groups: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = defaultdict(list)
    device = torch.device("cpu")
    for some, bound in ((tensors, MAX_MAGNITUDE), (squares, MAX_MAGNITUDE**2)):
        for tensor in some:
            local = local_shard(tensor)
            local = torch.view_as_real(local) if local.is_complex() else local
            if local.is_floating_point() and local.numel():
                groups[local.device, local.dtype, bound].append(local)
                if device.type == "cpu":
                    device = local.device
    found = torch.zeros((), dtype=torch.bool, device=device)
    for (_, dtype, bound), group in groups.items():
        # a bound that the dtype cannot hold would become infinity, and infinity would pass
        bound = min(bound, torch.finfo(dtype).max)
        # the largest magnitude of a tensor is nonfinite if any element is
        flag = (~(largest_magnitudes(stack_small(group)) <= bound)).any()
        # a flag on the host is used as a number: its copy to the device would synchronize
        found = found | (flag if flag.device.type == "cpu" else flag.to(device))
    return found
