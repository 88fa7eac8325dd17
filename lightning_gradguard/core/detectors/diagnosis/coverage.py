"""Parameters that are not trained, although they seem to be meant to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from torch.optim import Optimizer

from lightning_gradguard.core.parameter_names import plain_name

#: Share of the held parameters without a gradient from which on something is cut from the loss.
MIN_DETACHED = 0.2


@dataclass(frozen=True)
class Coverage:
    """Parameters that are not trained.

    Args:
        unheld: Names of parameters to which a gradient arrives and that no optimizer holds.
        orphans: Number of parameters that optimizers hold and the module does not.
        detached: Names of parameters that the optimizer holds, whose layer was called, and that get no
            gradient; empty where they are few and not in the first layer, as an unused pooling layer.
        unstepped: Names of parameters to which a gradient arrives and whose optimizer has never stepped.
        cleared: Names of parameters whose optimizer steps, and never had a gradient at its steps.
        unregistered: Names of parameters to which a gradient arrives, that no module has registered and no
            optimizer holds.
    """

    unheld: tuple[str, ...] = ()
    orphans: int = 0
    detached: tuple[str, ...] = ()
    unstepped: tuple[str, ...] = ()
    cleared: tuple[str, ...] = ()
    unregistered: tuple[str, ...] = ()


class Steps:
    """Keeps which optimizers have stepped, and which of them with a gradient.

    Attributes:
        updated: Ids of the latter, of which nothing else is to be kept.

    Example:
        >>> import torch
        >>> one, two = (torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1) for _ in range(2))
        >>> steps = Steps()
        >>> steps.add(one)
        >>> [steps.is_idle(one), steps.is_idle(two)], [steps.is_blind(one), steps.is_blind(two)]
        ([False, True], [True, False])
    """

    def __init__(self) -> None:
        self._stepped: set[int] = set()
        self.updated: set[int] = set()

    def add(self, optimizer: Optimizer) -> None:
        """Adds a step that an optimizer is about to take."""
        self._stepped.add(id(optimizer))
        if has_gradient(optimizer):
            self.updated.add(id(optimizer))

    def is_idle(self, optimizer: Optimizer) -> bool:
        """True for an optimizer that has not stepped."""
        return id(optimizer) not in self._stepped

    def is_blind(self, optimizer: Optimizer) -> bool:
        """True for an optimizer that has stepped, and never with a gradient."""
        return id(optimizer) in self._stepped - self.updated


def has_gradient(optimizer: Optimizer) -> bool:
    """True if a parameter of an optimizer has a gradient."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def coverage(
    module: nn.Module,
    optimizer: Optimizer,
    optimizers: Iterable[Optimizer],
    called: Iterable[str] = (),
    steps: Steps | None = None,
    unregistered: Mapping[str, nn.Parameter] = MappingProxyType({}),
) -> Coverage:
    """Returns the parameters that are not trained, right before an optimizer steps.

    `called` are the layers in the order of their calls, `steps` those of all optimizers since the start,
    `None` if that is too short ago, and `unregistered` parameters that took part in the step.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> sgd = torch.optim.SGD(net[1].parameters(), 0.1)
        >>> net(torch.ones(1, 2)).sum().backward()
        >>> coverage(net, sgd, [sgd]).unheld
        ('0.weight', '0.bias')
    """
    named = {parameter: plain_name(name) for name, parameter in module.named_parameters()}
    optimizers = list(optimizers)
    held = {p for one in optimizers for group in one.param_groups for p in group["params"]}
    unheld = tuple(n for p, n in named.items() if p not in held and p.requires_grad and p.grad is not None)
    own = [p for group in optimizer.param_groups for p in group["params"]]
    detached = _detached({p: named[p] for p in own if p in named and p.requires_grad}, list(called))
    unstepped, cleared = [], []
    for one in optimizers:
        if steps is None:
            break
        parameters = [
            p for group in one.param_groups for p in group["params"] if p in named and p.requires_grad
        ]
        if steps.is_idle(one):
            unstepped += [named[p] for p in parameters if p.grad is not None]
        elif steps.is_blind(one):
            cleared += [named[p] for p in parameters]
    orphans = sum(p not in named for p in held)
    unknown = tuple(name for name, p in unregistered.items() if p not in held and p.grad is not None)
    return Coverage(unheld, orphans, detached, tuple(unstepped), tuple(cleared), unknown)


def _detached(own: Mapping[nn.Parameter, str], called: list[str]) -> tuple[str, ...]:
    layers = set(called)
    without = {
        n: p
        for p, n in own.items()
        if p.grad is None and n.rpartition(".")[0] in layers and not _is_copied_to(n, p, own)
    }
    if not without or len(without) == len(own):
        return ()
    first = {n.rpartition(".")[0] for n in without} & set(called[:1])
    share = sum(p.numel() for p in without.values()) / max(sum(p.numel() for p in own), 1)
    return tuple(without) if first or share >= MIN_DETACHED else ()


def _is_copied_to(name: str, parameter: nn.Parameter, own: Mapping[nn.Parameter, str]) -> bool:
    """True for a parameter of a target network: a module with another name has the like, and is trained."""
    parts = name.split(".")
    for other, twin in own.items():
        if other.grad is not None and other.shape == parameter.shape:
            pairs = zip(parts, twin.split("."), strict=False)
            changed = [part for part, its in pairs if part != its]
            if twin.count(".") == name.count(".") and len(changed) == 1 and not changed[0].isdigit():
                return parts[-1] not in changed
    return False
