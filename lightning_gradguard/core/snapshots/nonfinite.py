"""Whether tensors are nonfinite, or as good as."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_gradguard.core.norms import largest_magnitudes, local_shard, together

#: A larger magnitude is as good as infinite: a sum of a few squares overflows float32. A flipped exponent
#: bit makes one of almost any weight.
LARGEST = 1e17


@torch.no_grad()
def any_nonfinite(tensors: Iterable[Tensor], squares: Iterable[Tensor] = ()) -> Tensor:
    """Whether any element is nonfinite, or as good as; a flag of shape `()` that nobody has waited for.

    It is on the device if any of the tensors is.

    Args:
        tensors: Those that are looked at; integers never are.
        squares: More of them, whose elements may be squares.

    Example:
        >>> any_nonfinite([torch.ones(2), torch.tensor([1.0, torch.inf])])
        tensor(True)
    """
    groups: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = defaultdict(list)
    for some, largest in ((tensors, LARGEST), (squares, LARGEST**2)):
        for tensor in some:
            local = local_shard(tensor)
            local = torch.view_as_real(local) if local.is_complex() else local
            if local.is_floating_point() and local.numel():
                groups[local.device, local.dtype, largest].append(local)
    device = next((device for device, *_ in groups if device.type != "cpu"), torch.device("cpu"))
    found = torch.zeros((), dtype=torch.bool, device=device)
    for (_, dtype, largest), group in groups.items():
        # a bound that the type cannot hold would become infinity, and let infinity pass
        bound = min(largest, torch.finfo(dtype).max)
        # the largest magnitude of each is nonfinite if any element is
        flag = (~(largest_magnitudes(together(group)) <= bound)).any()
        # one that is on the host goes along as a number, where a copy to the device would be waited for
        found = found | (flag if flag.device.type == "cpu" else flag.to(device))
    return found
