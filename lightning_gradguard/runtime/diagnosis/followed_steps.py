"""Examines what is left of an optimizer's step at the next one: gradients not cleared, undone updates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

#: Elements of the parameter that is followed, at most.
MAX_ELEMENTS = 65_536
#: Cosine distance below which two gradients are the same but for their length, which clipping changes, and
#: from which on they differ.
SAME, OTHER = 1e-4, 1e-2
#: Share of an update that is left, below which it was undone.
UNDONE = 0.1


class FollowedSteps:
    """Follows one parameter of each optimizer from a sampled step to the next step.

    Attributes:
        found: On the device, shape `(2,)`: if a step has had the gradients of the one before in its own, and
            if weights are nearly what they were before the step. Zeros until it is known.
        followed: The steps that are followed, by the id of their optimizer.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> followed = FollowedSteps()
        >>> (weight * torch.tensor([1.0, 2.0])).sum().backward()
        >>> followed.begin(sgd)
        >>> sgd.step()
        >>> followed.end_batch()
        >>> (weight * torch.tensor([2.0, -1.0])).sum().backward()
        >>> followed.end(sgd)
        >>> followed.found
        tensor([ True, False])
    """

    def __init__(self) -> None:
        self.found = torch.zeros(2, dtype=torch.bool)
        self.followed: dict[int, _FollowedStep] = {}

    def begin(self, optimizer: Optimizer) -> None:
        """Begins with a step that an optimizer is about to make."""
        held = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        fitting = [p for p in held if 1 < p.numel() <= MAX_ELEMENTS and type(p.grad) is Tensor]
        if fitting:
            self.followed[id(optimizer)] = _FollowedStep(max(fitting, key=torch.numel))

    def end_batch(self) -> None:
        """Takes note of what the steps have left."""
        self.found = torch.zeros(2, dtype=torch.bool)
        for step in self.followed.values():
            if step.handle is None:  # not one whose optimizer steps rarely
                step.end_batch()

    def end(self, optimizer: Optimizer) -> None:
        """Compares the step that an optimizer is about to make with the one before."""
        step = self.followed.pop(id(optimizer), None)
        if step is not None and step.handle is not None:
            self.found = self.found.to(step.parameter.device) | step.compare()

    def close(self) -> None:
        """Stops following."""
        for step in self.followed.values():
            if step.handle is not None:
                step.handle.remove()
        self.followed = {}


class _FollowedStep:
    """A parameter before and after a step, the gradient of the step, and the sum of what arrives after it."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self._before = parameter.detach().clone()
        self.handle: RemovableHandle | None = None

    def end_batch(self) -> None:
        self._after = self.parameter.detach().clone()
        gradient = self.parameter.grad
        self._used = torch.zeros_like(self._after) if gradient is None else gradient.detach().clone()
        self._arrived = torch.zeros_like(self._used)
        self.handle = self.parameter.register_hook(self._add)  # type: ignore[no-untyped-call]

    def compare(self) -> Tensor:
        assert self.handle is not None
        self.handle.remove()
        gradient = self.parameter.grad
        now = torch.zeros_like(self._used) if gradient is None else gradient.detach()
        both = torch.stack([self._used + self._arrived, self._arrived]).flatten(1)
        whole, alone = 1 - cosine_similarity(both, now.flatten()[None])
        left = (self.parameter.detach() - self._before).norm()
        keeps, is_undone = (
            (whole < SAME) & (alone > OTHER),
            left < UNDONE * (self._after - self._before).norm(),
        )
        return torch.stack([keeps, is_undone])

    def _add(self, gradient: Tensor) -> None:
        self._arrived += gradient.detach()
