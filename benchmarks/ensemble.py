"""Trains many copies of a small network at once, each with its own weights, optimizer and rate.

A step of a tiny network is mostly overhead, which an ensemble pays once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

#: Momentum, if it normalizes gradients, and decoupled weight decay.
RULES = {
    "SGD": (0.0, False, 0.0),
    "momentum": (0.9, False, 0.0),
    "Adam": (0.9, True, 0.0),
    "AdamW": (0.9, True, 0.1),
}


class Ensemble:
    """Networks of one architecture that are trained side by side.

    Args:
        networks: The members.
        loss: Of output and target.
        optimizers: Keys of `RULES`, one for each member.
        rates: Learning rates, one for each member.
        data_differ: True if batches have a first dimension of members.
    """

    def __init__(
        self,
        networks: Sequence[nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizers: Sequence[str],
        rates: Sequence[float],
        *,
        data_differ: bool = False,
    ) -> None:
        weights, self._buffers = stack_module_state(list(networks))
        self._shapes = {name: weight.shape for name, weight in weights.items()}
        flat = [weight.detach().flatten(1) for weight in weights.values()]
        self._sizes = [part.shape[1] for part in flat]
        self.weights = torch.cat(flat, 1).requires_grad_()
        self._first, self._second = torch.zeros_like(self.weights), torch.zeros_like(self.weights)
        self._momentum = torch.tensor([RULES[o][0] for o in optimizers])[:, None]
        self._adaptive = torch.tensor([RULES[o][1] for o in optimizers])[:, None]
        self._decay = torch.tensor([RULES[o][2] for o in optimizers])[:, None]
        self._rates = torch.tensor(rates)[:, None]
        self._n_steps = 0
        skeleton = copy.deepcopy(networks[0]).to("meta")

        def one(parts: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Any:
            output = functional_call(skeleton, (parts, buffers), (x,))
            return loss(output, y), output

        dims = (0, 0, 0, 0) if data_differ else (0, 0, None, None)
        self._run = vmap(one, in_dims=dims, randomness="different")

    def keep(self, members: Sequence[int]) -> None:
        """Trains these members on, and forgets the others."""
        index = torch.tensor(members)
        self.weights = self.weights.detach()[index].requires_grad_()
        self._first, self._second = self._first[index], self._second[index]
        self._momentum, self._adaptive = self._momentum[index], self._adaptive[index]
        self._decay, self._rates = self._decay[index], self._rates[index]
        self._buffers = {name: buffer[index] for name, buffer in self._buffers.items()}

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss and the output of each member on a batch."""
        split = self.weights.split(self._sizes, 1)
        parts = {n: p.unflatten(1, s[1:]) for (n, s), p in zip(self._shapes.items(), split, strict=True)}
        found: tuple[Tensor, Tensor] = self._run(parts, self._buffers, x, y)
        return found

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Makes a step of each optimizer; returns the losses before it."""
        losses, _ = self.losses(x, y)
        (gradient,) = torch.autograd.grad(losses.sum(), self.weights)
        self._n_steps += 1
        with torch.no_grad():
            taken = torch.where(self._adaptive, 0.1, 1.0)
            self._first.mul_(self._momentum).add_(gradient * taken)
            self._second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            scale = (self._second / (1 - 0.999**self._n_steps)).sqrt_().add_(1e-8)
            adam = self._first / (1 - 0.9**self._n_steps) / scale
            update = torch.where(self._adaptive, adam, self._first) + self._decay * self.weights
            self.weights.sub_(self._rates * update)
        return losses.detach()


class Separate:
    """The same for networks with recurrent modules, which `vmap` does not know: one after the other."""

    def __init__(
        self,
        networks: Sequence[nn.Module],
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizers: Sequence[str],
        rates: Sequence[float],
        *,
        data_differ: bool = False,
    ) -> None:
        self._loss, self._data_differ = loss, data_differ
        self._networks = [copy.deepcopy(network) for network in networks]
        self._optimizers = [
            _OPTIMIZERS[name](network.parameters(), rate)
            for name, network, rate in zip(optimizers, self._networks, rates, strict=True)
        ]

    def keep(self, members: Sequence[int]) -> None:
        """Trains these members on, and forgets the others."""
        self._networks = [self._networks[i] for i in members]
        self._optimizers = [self._optimizers[i] for i in members]

    def losses(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the loss and the output of each member on a batch."""
        outputs = [n(x[i] if self._data_differ else x) for i, n in enumerate(self._networks)]
        found = [self._loss(o, y[i] if self._data_differ else y) for i, o in enumerate(outputs)]
        return torch.stack(found), torch.stack(outputs)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        """Makes a step of each optimizer; returns the losses before it."""
        losses, _ = self.losses(x, y)
        for optimizer in self._optimizers:
            optimizer.zero_grad()
        losses.sum().backward()
        for optimizer in self._optimizers:
            optimizer.step()
        return losses.detach()


_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters, rate: torch.optim.SGD(parameters, rate, fused=True),
    "momentum": lambda parameters, rate: torch.optim.SGD(parameters, rate, momentum=0.9, fused=True),
    "Adam": lambda parameters, rate: torch.optim.Adam(parameters, rate, fused=True),
    "AdamW": lambda parameters, rate: torch.optim.AdamW(parameters, rate, weight_decay=0.1, fused=True),
}


def ensemble(networks: Sequence[nn.Module], *arguments: Any, **options: Any) -> Ensemble | Separate:
    """Returns an ensemble of some networks; of those with recurrent modules, a slow one."""
    is_recurrent = any(isinstance(module, nn.RNNBase) for module in networks[0].modules())
    return (Separate if is_recurrent else Ensemble)(networks, *arguments, **options)
