"""A module's buffers: copies that are refreshed at every step, and those that must stay finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightning_gradguard.core.norms import local_shard
from lightning_gradguard.core.snapshots.nonfinite import any_nonfinite

#: Size up to which a buffer is copied at every step. The version counter shows that a larger one was written;
#: for small ones it is not reliable: torch writes the running statistics of batch normalization without
#: counting.
MAX_ALWAYS_COPIED_NUMEL = 65_536


@dataclass
class _Copy:
    buffer: Tensor
    local: Tensor
    version: int
    saved: Tensor
    is_small: bool

    @classmethod
    def of(cls, buffer: Tensor) -> _Copy:
        local = local_shard(buffer)
        is_small = buffer.numel() <= MAX_ALWAYS_COPIED_NUMEL
        return cls(buffer, local, buffer._version, local.clone(), is_small)


class BufferCopies:
    """Copies of a module's buffers, and of frozen weights that are written, as those of a target network.

    Non-persistent buffers are included. Large ones, such as masks and tables of positions, cost nothing while
    they are not written. Frozen weights cost nothing until their first write, which cannot be undone.

    Args:
        module: The module whose buffers, submodules included, are kept.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> copies = BufferCopies(norm)
        >>> _ = norm(torch.full((4, 2), torch.nan))
        >>> copies.restore()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copies: dict[tuple[nn.Module, str], _Copy] = {}
        self._frozen: dict[nn.Parameter, int] = {}
        self._written: dict[nn.Parameter, _Copy] = {}
        self.rescan()
        self.refresh()

    def rescan(self) -> None:
        """Lists the submodules again, after some were added or replaced."""
        self._owners = list(self._module.modules())

    @torch.no_grad()
    def refresh(self, *, within_step: bool = False) -> None:
        """Copies the current buffers; `within_step`, weights may be frozen by `toggle_optimizer` alone."""
        old, self._copies = self._copies, {}
        pairs = []
        for weight, copy_ in self._written.items():
            pairs.append((copy_.saved, local_shard(weight)))
        for owner in self._owners:
            for parameter in owner._parameters.values():
                if parameter is None or parameter.requires_grad or within_step or parameter in self._written:
                    continue
                before = self._frozen.get(parameter, parameter._version)
                self._frozen[parameter] = parameter._version
                if parameter._version != before:
                    self._written[parameter] = _Copy.of(parameter)
        for owner, name, buffer in module_buffers(self._owners):
            known = old.get((owner, name))
            if known is None or known.buffer is not buffer or known.saved.shape != buffer.shape:
                known = _Copy.of(buffer)
            elif known.is_small or buffer._version != known.version:
                pairs.append((known.saved, known.local))
                known.version = buffer._version
            self._copies[owner, name] = known
        copy_tensors(pairs)

    @torch.no_grad()
    def restore(self) -> None:
        """Restores the buffers in place, as of the last `refresh`.

        A backward pass through normalization remains possible, as for a generator whose critic's step was
        skipped.
        """
        pairs = [(local_shard(weight), copy_.saved) for weight, copy_ in self._written.items()]
        for (owner, name), copy_ in self._copies.items():
            owner._buffers[name] = copy_.buffer  # a forward pass may have replaced or removed it
            if copy_.is_small or copy_.buffer._version != copy_.version:
                target = copy_.local
                # hidden from autograd: a graph holds running statistics but does not use them backward
                pairs.append((target.data if isinstance(owner, _NormBase) else target, copy_.saved))
        copy_tensors(pairs)
        for copy_ in self._copies.values():
            copy_.version = copy_.buffer._version

    def saved(self) -> dict[Any, Tensor]:
        """Returns the copies: of buffers by owner and name, of frozen weights by the parameter."""
        buffers = {place: copy_.saved for place, copy_ in self._copies.items()}
        return {**buffers, **{weight: copy_.saved for weight, copy_ in self._written.items()}}

    def now_and_saved(self, places: Iterable[tuple[nn.Module, str]]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns buffers as they are (local shards) and their copies, of the places that have both."""
        now, saved = [], []
        for owner, name in places:
            copy_, buffer = self._copies.get((owner, name)), owner._buffers.get(name)
            if copy_ is not None and buffer is not None:
                now.append(copy_.local if buffer is copy_.buffer else local_shard(buffer))
                saved.append(copy_.saved)
        return now, saved

    def written(self) -> Collection[nn.Parameter]:
        """Returns the frozen weights that have been written."""
        return self._written.keys()


class FiniteBuffers:
    """Buffers that are finite when training begins, as far as they are still the same tensors.

    A mask of `-inf` is not among them, nor is a buffer that the first batch creates. Statistics of
    normalization are, also where weight averaging has replaced them.

    Args:
        module: The module whose buffers, submodules included, are listed.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> norm.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        >>> len(list(FiniteBuffers(norm)))
        3
    """

    def __init__(self, module: nn.Module) -> None:
        found = module_buffers(module.modules())
        self._finite = [(owner, name, b) for owner, name, b in found if not bool(any_nonfinite([b]))]

    def __iter__(self) -> Iterator[Tensor]:
        for owner, name, buffer in self._finite:
            now = owner._buffers.get(name)
            if now is not None and (now is buffer or isinstance(owner, _NormBase)):
                yield now

    def statistics(self) -> list[tuple[nn.Module, str]]:
        """Returns owner and name of the running statistics of normalization among them."""
        return [
            (owner, name)
            for owner, name, buffer in self._finite
            if isinstance(owner, _NormBase) and buffer.is_floating_point() and buffer.numel()
        ]


def module_buffers(owners: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """Returns every materialized buffer of some modules, with its owner and name."""
    return [
        (owner, name, buffer)
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]


def copy_tensors(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies to each target its source, in one operation for each pair of devices and dtypes."""
    groups: dict[Any, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for target, source in pairs:
        groups[target.device, target.dtype, source.device, source.dtype].append((target, source))
    # torch copies one by one if a list has several devices or dtypes
    for alike in groups.values():
        targets, sources = zip(*alike, strict=True)
        torch._foreach_copy_(targets, sources)
