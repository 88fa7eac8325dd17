"""Buffers that a batch has corrupted although its loss and its gradients are finite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from lightning_gradguard.core.forensics.origin import Origin
from lightning_gradguard.core.forensics.trace import is_nonfinite
from lightning_gradguard.core.snapshots import SEEN, has_jumped, has_outlying_row, running_variances


def buffers_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns copies of the finite floating-point buffers, by name."""
    finite = ((n, b) for n, b in module.named_buffers() if b.is_floating_point() and not is_nonfinite(b))
    return {name: buffer.detach().clone() for name, buffer in finite}


def corrupted_buffers(
    module: nn.Module, before: Mapping[str, Tensor], parts: Iterable[Tensor] = ()
) -> dict[str, str]:
    """Returns by name what has become of buffers, from `buffers_of`, that the forward pass has corrupted."""
    has_outlier = bool(has_outlying_row(parts))
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in before}
    found = {
        name: f"left nonfinite values in {_plain(name)}" for name, b in buffers.items() if is_nonfinite(b)
    }
    names = {owner: name for name, owner in module.named_modules()}
    for owner, attribute in running_variances(module.modules()):
        name = f"{names[owner]}.{attribute}".lstrip(".")
        has_settled = isinstance(owner, _NormBase) and int(owner.num_batches_tracked or 0) > SEEN
        if name in buffers and name not in found and (has_settled or has_outlier):
            now, then = buffers[name], before[name]
            if bool(has_jumped([now], [then])):
                numbers = f"from at most {float(then.amax()):.3g} to {float(now.amax()):.3g}"
                found[name] = f"raised {_plain(name)} {numbers}"
    return {_plain(name): became for name, became in found.items()}


def _plain(name: str) -> str:
    return name.replace("_orig_mod.", "")


def origin_in_buffers(corrupted: Mapping[str, str]) -> Origin:
    """Returns the origin from a nonempty result of `corrupted_buffers`.

    Example:
        >>> origin_in_buffers({"norm.running_var": "left nonfinite values in it"}).module
        'norm'
    """
    where = tuple(corrupted)
    detail = f"Loss and gradients are finite, but the forward pass {corrupted[where[0]]}"
    return Origin("forward_pass", "forward", where[0].rpartition(".")[0], where=where, detail=detail)
