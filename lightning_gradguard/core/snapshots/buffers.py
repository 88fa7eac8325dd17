"""Copies of a module's buffers, refreshed at every step."""

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

#: Elements up to which a buffer is copied at every step. The version counter tells whether a larger one was
#: written; for small ones it is not trusted: torch writes the running statistics of batch normalization
#: without counting.
SMALL = 65_536


@dataclass
class _Copy:
    buffer: Tensor
    version: int
    saved: Tensor

    @property
    def may_have_changed(self) -> bool:
        return self.buffer.numel() <= SMALL or self.buffer._version != self.version


class BufferCopies:
    """Copies of a module's buffers, and of frozen weights that somebody writes, as those of a target network.

    Buffers that are left out of `state_dict` are among them. Large ones, such as masks and tables of
    positions, cost nothing while nobody writes them, and frozen weights cost nothing until somebody has; the
    first time is seen too late to be undone.

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
        """Find the submodules: there may be others by now."""
        self._owners = list(self._module.modules())

    @torch.no_grad()
    def refresh(self, *, within_step: bool = False) -> None:
        """Copy the buffers as they are now.

        Args:
            within_step: Whether weights may want no gradient only because another optimizer has its turn.
        """
        old, self._copies = self._copies, {}
        targets, sources = [], []
        for weight, copy_ in self._written.items():
            targets.append(copy_.saved)
            sources.append(local_shard(weight))
        for weight in (w for owner in self._owners for w in owner._parameters.values() if w is not None):
            if not (weight.requires_grad or within_step or weight in self._written):
                before = self._frozen.get(weight, weight._version)
                self._frozen[weight] = weight._version
                if weight._version != before:
                    self._written[weight] = _Copy(weight, 0, local_shard(weight).clone())
        for owner, name, buffer in module_buffers(self._owners):
            known = old.get((owner, name))
            if known is None or known.buffer is not buffer or known.saved.shape != buffer.shape:
                known = _Copy(buffer, buffer._version, local_shard(buffer).clone())
            elif known.may_have_changed:
                targets.append(known.saved)
                sources.append(local_shard(buffer))
                known.version = buffer._version
            self._copies[owner, name] = known
        copy_tensors(targets, sources)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back, in place, as the last `refresh` found them.

        A graph through normalization can still go backward, as that of a generator whose critic's step was
        skipped.
        """
        targets, sources = [], []
        for (owner, name), copy_ in self._copies.items():
            owner._buffers[name] = copy_.buffer  # a forward pass may have put another tensor there, or none
            if copy_.may_have_changed:
                target = local_shard(copy_.buffer)
                # unseen by autograd: a graph holds running statistics, but does not use them to go backward
                targets.append(target.data if isinstance(owner, _NormBase) else target)
                sources.append(copy_.saved)
        for weight, copy_ in self._written.items():
            targets.append(local_shard(weight))
            sources.append(copy_.saved)
        copy_tensors(targets, sources)
        for copy_ in self._copies.values():
            copy_.version = copy_.buffer._version

    def saved(self) -> dict[Any, Tensor]:
        """The copies: of buffers by owner and name, of frozen weights by themselves."""
        buffers = {place: copy_.saved for place, copy_ in self._copies.items()}
        return {**buffers, **{weight: copy_.saved for weight, copy_ in self._written.items()}}

    def written(self) -> Collection[nn.Parameter]:
        """Frozen weights that somebody has written."""
        return self._written.keys()


def module_buffers(owners: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Every materialized buffer of some modules, with its owner and name."""
    for owner in owners:
        for name, buffer in owner._buffers.items():
            if buffer is not None and not is_lazy(buffer):
                yield owner, name, buffer


def copy_tensors(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy tensors in place, in one operation for each pair of devices and dtypes."""
    if not targets:
        return
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        group = groups[target.device, target.dtype, source.device, source.dtype]
        group[0].append(target)
        group[1].append(source)
    # of different kinds in one list, torch would copy each by itself
    for alike in groups.values():
        torch._foreach_copy_(*alike)
