"""Compares weights at the end of an epoch with those at its start and at that of the next one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.core.norms import local_shard
from lightning_gradguard.core.parameter_names import plain_name
from lightning_gradguard.runtime.diagnosis.followed_steps import UNDONE

#: Ends of epochs that are compared, and elements of each weight matrix.
MAX_ENDS, MAX_ELEMENTS = 4, 256
#: Change of a matrix over its norm, and share of all matrices, from which on weights were reset.
RESET, MOST = 0.5, 0.5


class EpochEnds:
    """Counts the ends of epochs at which most weights are replaced, or what the epoch has changed is undone.

    Attributes:
        in_a_row: Their number up to the last end, on the device.
        is_pending: True from the end of an epoch to the first step of the next, and at the start.

    Example:
        >>> net, ends = nn.Linear(3, 3), EpochEnds()
        >>> sgd = torch.optim.SGD(net.parameters(), 0.1)
        >>> for _ in range(3):
        ...     ends.begin_epoch(net, [sgd])
        ...     net.reset_parameters()
        ...     ends.end_epoch(net)
        ...     net.reset_parameters()
        >>> ends.in_a_row
        tensor(2.)
    """

    def __init__(self) -> None:
        self.in_a_row = torch.zeros(())
        self.is_pending = True
        self._begun: dict[str, Tensor] = {}
        self._ended: dict[str, Tensor] = {}
        self._n_ends = 0

    @property
    def wants_sample(self) -> bool:
        """True where the next step shows what has become of the weights of an epoch before."""
        return self.is_pending and bool(self._ended)

    def end_epoch(self, module: nn.Module) -> None:
        """Keeps a part of each weight matrix after the last step of an epoch."""
        self._n_ends += 1
        self.is_pending = self._n_ends <= MAX_ENDS
        if self.is_pending:
            self._ended = {name: part for name, part in _parts(module).items() if name in self._begun}

    def begin_epoch(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Compares them with the weights of the next step, by name: a module may have been made anew."""
        self.is_pending = False
        held = {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
        begun, self._begun = self._begun, _parts(module, held)
        changes = [
            ((now - end).norm() > RESET * end.norm())
            | ((now - begun[n]).norm() < UNDONE * (end - begun[n]).norm())
            for n, end in self._ended.items()
            if (now := self._begun.get(n)) is not None and now.shape == end.shape == begun[n].shape
        ]
        if changes:
            is_reset = torch.stack(changes).float().mean() > MOST
            self.in_a_row = (self.in_a_row.to(is_reset.device) + 1) * is_reset


def _parts(module: nn.Module, held: set[Tensor] | None = None) -> dict[str, Tensor]:
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1 and (held is None or parameter in held):
            values = local_shard(parameter.detach()).reshape(-1)
            found[plain_name(name)] = values[:: max(len(values) // MAX_ELEMENTS, 1)].clone()
    return found
