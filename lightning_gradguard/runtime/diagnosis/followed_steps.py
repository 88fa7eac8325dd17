"""Examines what is left of an optimizer's step at the next one: gradients not cleared, undone updates."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.optim import Optimizer

from lightning_gradguard.runtime.optimizer_hooks import after_step

#: Elements of the parameter that is followed, at most.
MAX_ELEMENTS = 65_536
#: Relative distance up to which gradients are those that were left, and not decayed, as where momentum is
#: written by hand; cosine distance up to which they are those of the new step alone.
SAME, ALONE = 1e-4, 1e-2
#: Share of an update that is left, below which it was undone.
UNDONE = 0.1


class FollowedSteps:
    """Follows one parameter of each optimizer from a sampled step to the next step.

    Attributes:
        found: On the device, shape `(2,)`: if a step has had the gradients of the one before in its own, and
            if the first gradient after it is of weights nearly as they were before the step. Zeros until it
            is known.
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
        held = [p for group in optimizer.param_groups for p in group["params"] if _is_fitting(p)]
        if held:
            self.followed[id(optimizer)] = _FollowedStep(max(held, key=torch.numel), optimizer)

    def end_batch(self) -> None:
        """Takes note of what the steps have left."""
        self.found = torch.zeros(2, dtype=torch.bool)
        for step in self.followed.values():
            step.end_batch()

    def end(self, optimizer: Optimizer) -> None:
        """Compares the step that an optimizer is about to make with the one before, of an earlier batch."""
        step = self.followed.pop(id(optimizer), None)
        if step is not None:
            step.close()
            if step.after is not None:
                self.found = self.found.to(step.after.device) | step.compare(step.after)

    def close(self) -> None:
        """Stops following."""
        for step in self.followed.values():
            step.close()
        self.followed = {}


class _FollowedStep:
    """A parameter before and after a step, the gradient of the step, and the sum of what arrives after it."""

    def __init__(self, parameter: Tensor, optimizer: Optimizer) -> None:
        self.parameter = parameter
        self.after: Tensor | None = None
        self._before = parameter.detach().clone()
        self._left: Tensor | None = None
        self._kept = torch.zeros((), dtype=torch.bool, device=parameter.device)
        self._used = torch.zeros_like(parameter, dtype=torch.float32)
        self._arrived = torch.zeros_like(self._used)
        self._handles = (
            parameter.register_hook(self._add),  # type: ignore[no-untyped-call]
            after_step(optimizer, self._take_gradient),
        )

    def end_batch(self) -> None:
        if self.after is None:
            self.after = self.parameter.detach().clone()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def compare(self, after: Tensor) -> Tensor:
        # where gradients were written by hand, those that were left are gone
        distance = 1 - cosine_similarity(_gradient(self.parameter).flatten(), self._arrived.flatten(), dim=0)
        update = (after - self._before).norm()
        left = update if self._left is None else self._left
        return torch.stack([self._kept & (distance > ALONE), left < UNDONE * update])

    def _add(self, gradient: Tensor | None) -> None:
        if self.after is not None:
            # before it is averaged over ranks, with which the sum could not be compared
            then = self._used + self._arrived
            kept = (_gradient(self.parameter) - then).norm() < SAME * then.norm()
            self._kept = kept if self._left is None else self._kept & kept
            # not right before the next step: where weights are perturbed for its gradient, they still are
            if self._left is None:
                self._left = (self.parameter.detach() - self._before).norm()
        if gradient is not None:  # a backward pass of the user's own may return none
            self._arrived += gradient.detach()

    def _take_gradient(self) -> None:
        self._used = _gradient(self.parameter).clone()
        self._arrived = torch.zeros_like(self._used)


def _gradient(parameter: Tensor) -> Tensor:
    """Returns the gradient of a parameter in float32, 0 without one."""
    gradient = parameter.grad
    return torch.zeros_like(parameter, dtype=torch.float32) if gradient is None else gradient.detach().float()


def _is_fitting(parameter: Tensor) -> bool:
    """Returns true for a dense, real and trained parameter that is small enough to be kept."""
    gradient = parameter.grad
    is_small = 1 < parameter.numel() <= MAX_ELEMENTS
    is_dense = type(gradient) is Tensor and gradient.layout is torch.strided
    return is_small and is_dense and parameter.is_floating_point() and parameter.requires_grad
