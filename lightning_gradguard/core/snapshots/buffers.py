"""A module's buffers: copies that are refreshed at every step, and those that must stay finite."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, filterfalse
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from lightning_gradguard.core.norms import local_shard
from lightning_gradguard.core.snapshots.nonfinite import any_nonfinite
from lightning_gradguard.core.snapshots.statistics import running_variances

#: Size up to which a buffer is copied at every step. The version counter shows that a larger one was written;
#: for small ones it is not reliable: torch writes the running statistics of batch normalization without
#: counting.
MAX_ALWAYS_COPIED_NUMEL = 65_536
_SHAPE, _IS_TRAINED = attrgetter("shape"), attrgetter("requires_grad")


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

    Attributes:
        modules: The module and its submodules; another list once some were added or replaced.

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
        self._list()
        self._find_written()

    def refresh(self, *, within_step: bool = False) -> None:
        """Copies the current buffers; `within_step`, weights may be frozen by `toggle_optimizer` alone."""
        present = list(map(id, chain.from_iterable(map(dict.values, self._contents))))
        if present != self._present or list(map(_SHAPE, self._buffers)) != self._shapes:
            self._list()
        if not (within_step or all(map(_IS_TRAINED, self._weights))):
            self._find_written()
        if self._copies or self._written:
            self._copy()

    def _find_written(self) -> None:
        for weight in filterfalse(_IS_TRAINED, self._weights):
            before = self._frozen.get(weight, weight._version)
            self._frozen[weight] = weight._version
            if weight._version != before and weight not in self._written:
                self._written[weight] = _Copy.of(weight)

    @torch.no_grad()
    def _list(self) -> None:
        """Lists submodules, buffers and weights, the same ones as long as identities and shapes are."""
        self.modules = list(self._module.modules())
        self._contents: list[dict[str, Any]] = []
        for owner in self.modules:
            self._contents += [owner._modules, owner._buffers, owner._parameters]
        old, self._copies = self._copies, {}
        for owner, name, buffer in module_buffers(self.modules):
            known = old.get((owner, name))
            if known is None or known.buffer is not buffer or known.saved.shape != buffer.shape:
                known = _Copy.of(buffer)
            self._copies[owner, name] = known
        copies = self._copies.values()
        self._buffers = [copy_.buffer for copy_ in copies]
        self._shapes = [buffer.shape for buffer in self._buffers]
        self._small = grouped((copy_.saved, copy_.local) for copy_ in copies if copy_.is_small)
        self._large = [copy_ for copy_ in copies if not copy_.is_small]
        self._weights = [w for owner in self.modules for w in owner._parameters.values() if w is not None]
        present = list(chain.from_iterable(map(dict.values, self._contents)))
        # a lazy buffer keeps its identity when it gets a shape
        self._present = [] if any(map(is_lazy, present)) else list(map(id, present))

    @torch.no_grad()
    def _copy(self) -> None:
        for targets, sources in self._small:
            torch._foreach_copy_(targets, sources)
        pairs = []
        for weight, copy_ in self._written.items():
            pairs.append((copy_.saved, local_shard(weight)))
        for copy_ in self._large:
            if copy_.buffer._version != copy_.version:
                copy_.version = copy_.buffer._version
                pairs.append((copy_.saved, copy_.local))
        if pairs:
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
            if copy_.local.shape != copy_.saved.shape:  # or have given it other memory, as a queue that grows
                copy_.local.data = copy_.saved.clone()
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
        own = running_variances({owner for owner, _, _ in self._finite})
        return [
            (owner, name)
            for owner, name, buffer in self._finite
            if (isinstance(owner, _NormBase) or (owner, name) in own)
            and buffer.is_floating_point()
            and buffer.numel()
        ]


def module_buffers(owners: Iterable[nn.Module]) -> list[tuple[nn.Module, str, Tensor]]:
    """Returns every materialized buffer of some modules, with its owner and name."""
    return [
        (owner, name, buffer)
        for owner in owners
        for name, buffer in owner._buffers.items()
        if buffer is not None and not is_lazy(buffer)
    ]


def grouped(pairs: Iterable[tuple[Tensor, Tensor]]) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Returns targets and sources by their devices and dtypes: torch copies others one by one."""
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in pairs:
        targets, sources = groups[target.device, target.dtype, source.device, source.dtype]
        targets.append(target)
        sources.append(source)
    return list(groups.values())


def copy_tensors(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copies to each target its source, in one operation for each pair of devices and dtypes."""
    for targets, sources in grouped(pairs):
        torch._foreach_copy_(targets, sources)
