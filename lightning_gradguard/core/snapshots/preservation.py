"""Preservation of random numbers, and of everything that a forward pass may change in a module."""

from __future__ import annotations

import copy
import random
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradguard.core.snapshots.buffers import BufferCopies
from lightning_gradguard.core.snapshots.libraries import LIBRARIES, TORCH

_INTERNAL = frozenset(nn.Module().__dict__)
_PACKAGE = __name__.partition(".")[0]
#: Methods of environments and of their spaces, and those of what runs the module, as a Trainer.
_ENVIRONMENT, _SPACE, _RUNS = ("reset", "step"), ("seed", "sample"), ("fit", "validate", "predict")
#: Elements of a list or dictionary that are searched for objects, and bytes of an array that is copied.
_MOST_ELEMENTS, _MOST_BYTES = 100, 2**28


def rng_state() -> dict[str, Any]:
    """Returns the state of every random number generator that training uses.

    Generators of GPUs are omitted until CUDA is in use: reading them would initialize it, and processes that
    are forked later could not use it.
    """
    return {**_torch_rng_state(), "numpy": np.random.get_state(), "python": random.getstate()}


def _torch_rng_state() -> dict[str, Any]:
    return {
        "torch": torch.default_generator.get_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores a result of `rng_state`, or of `StepRandomness.before_step`."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state:
        np.random.set_state(state["numpy"])
        random.setstate(state["python"])


class StepRandomness:
    """Random states from which steps can be run again, without the generators from which no step draws.

    The states of numpy and Python take a hundred times as long to read as that of torch. They are read around
    the first steps and those that are probed, and from then on at each step if one of these drew from them.

    Attributes:
        draws_on_host: True if the last probed step drew from the generators of numpy or Python.
        is_probing: True between `before_step` and `after_step` of a probed step, which needs the latter.

    Example:
        >>> randomness = StepRandomness()
        >>> for _ in range(StepRandomness.PROBED + 1):
        ...     state = randomness.before_step()
        ...     _ = torch.rand(2)  # the step
        ...     if randomness.is_probing:
        ...         randomness.after_step()
        >>> sorted(state)
        ['cuda', 'torch']
    """

    #: Steps that are probed first.
    PROBED = 10

    def __init__(self) -> None:
        self._n_to_probe = self.PROBED
        self.draws_on_host = False
        self.is_probing = False
        self._before: dict[str, Any] = {}

    def probe_next_step(self) -> None:
        """Reads all states around the next step, which may have begun to draw from another generator."""
        self._n_to_probe = max(self._n_to_probe, 1)

    def before_step(self) -> dict[str, Any]:
        """Returns the states that `set_rng_state` restores ahead of running the step again."""
        if self.draws_on_host:
            return rng_state()
        if not self._n_to_probe:
            return _torch_rng_state()
        self._n_to_probe -= 1
        self.is_probing = True
        self._before = rng_state()
        return self._before

    def after_step(self) -> None:
        """Compares the states with those before a probed step."""
        self.is_probing = False
        pairs = zip(self._before["numpy"], np.random.get_state(), strict=True)
        is_unchanged = all(np.array_equal(*pair) for pair in pairs)
        self.draws_on_host = not (is_unchanged and self._before["python"] == random.getstate())


@contextmanager
def preserve_randomness(*owners: object) -> Iterator[None]:
    """Restores on exit the global random number generators, and the `generator` that an owner may have."""
    random_numbers = rng_state()
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        set_rng_state(random_numbers)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Restores on exit the buffers, random numbers, training modes and plain attributes of a module.

    Attributes of objects that the module holds, such as an environment or a replay buffer, are included.
    Weights and their `.grad` are not: a forward pass does not write them.

    Example:
        >>> network = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
        >>> state = torch.get_rng_state()
        >>> with preserve_state(network):
        ...     _ = network(torch.ones(4, 2))
        >>> network[1].num_batches_tracked, torch.equal(state, torch.get_rng_state())
        (tensor(0), True)
    """
    buffers = BufferCopies(module)
    random_numbers = rng_state()
    modes = [(m, m.training) for m in module.modules()]
    holders = [(h, {k: _copied(v) for k, v in _attributes(h).items()}) for h in _holders(module)]
    try:
        yield
    finally:
        buffers.restore()
        set_rng_state(random_numbers)
        for owner, mode in modes:
            owner.training = mode
        for holder, saved in holders:
            for key in _attributes(holder).keys() - saved.keys():
                del holder.__dict__[key]
            for key, (original, content) in saved.items():
                holder.__dict__[key] = _restored(original, content)


@contextmanager
def preserve_weights(module: nn.Module) -> Iterator[None]:
    """Restores on exit the weights of a module, their gradients, and which of them are trained."""
    saved = [(p, p.detach().clone(), p.grad, p.requires_grad) for p in module.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, gradient, requires_grad in saved:
                parameter.copy_(value)
                parameter.grad = gradient
                parameter.requires_grad_(requires_grad)


def _holders(module: nn.Module) -> list[Any]:
    """Returns the submodules, and the objects with a state that they hold, directly or in each other."""
    holders: dict[int, Any] = {}
    waiting: list[Any] = [*module.modules()]
    while waiting:
        holder = waiting.pop()
        if id(holder) not in holders:
            holders[id(holder)] = holder
            for value in _attributes(holder).values():
                elements = value.values() if isinstance(value, dict) else value
                is_searched = isinstance(value, (list, tuple, dict)) and len(value) <= _MOST_ELEMENTS
                waiting += filter(_has_state, elements if is_searched else [value])
    return [*holders.values()]


def _has_state(value: Any) -> bool:
    """True for an object of the user's code, or an environment, whose attributes a step may change."""
    kind = type(value)
    is_code = isinstance(value, (type, ModuleType)) or (callable(value) and hasattr(value, "__name__"))
    if is_code or not isinstance(getattr(value, "__dict__", None), dict):
        return False
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    is_own = kind.__module__ == "__main__" or (file and not file.startswith((TORCH, *LIBRARIES)))
    is_ours = kind.__module__.partition(".")[0] == _PACKAGE
    if is_ours or _has_methods(kind, _RUNS):
        return False
    return bool(is_own) or _has_methods(kind, _ENVIRONMENT) or _has_methods(kind, _SPACE)


def _has_methods(kind: type, names: Sequence[str]) -> bool:
    return all(hasattr(kind, name) for name in names)


def _attributes(holder: Any) -> dict[str, Any]:
    """Returns plain attributes, such as the states of a metric or a list of outputs."""
    return {key: value for key, value in vars(holder).items() if key not in _INTERNAL}


def _copied(value: Any, depth: int = 3) -> tuple[Any, Any]:
    """Returns an object and its content, where that can be restored."""
    content: Any = None
    if isinstance(value, (Tensor, np.ndarray)):
        is_dense = not isinstance(value, Tensor) or value.layout == torch.strided
        if is_dense and value.nbytes <= _MOST_BYTES:
            content = value.detach().clone() if isinstance(value, Tensor) else value.copy()
    elif isinstance(value, dict):
        is_searched = depth > 0 and len(value) <= _MOST_ELEMENTS
        content = {
            k: _copied(v, depth - 1) if is_searched and _is_container(v) else (v, None)
            for k, v in value.items()
        }
    elif _is_container(value):
        content = copy.copy(value)
    elif isinstance(value, torch.Generator):
        content = value.get_state()
    elif isinstance(value, random.Random):
        with suppress(NotImplementedError):  # that of the system has no state
            content = value.getstate()
    elif isinstance(value, np.random.Generator):
        content = value.bit_generator.state
    return value, content


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, deque, dict, set))


def _restored(original: Any, content: Any) -> Any:
    """Returns the original object with the copied content."""
    if content is None:
        return original
    if isinstance(original, (Tensor, np.ndarray)):
        # a read-only array, an expanded tensor or one of inference cannot be written, and so was not
        with suppress(RuntimeError, ValueError), torch.no_grad():
            original[...] = content
    elif isinstance(original, (list, deque)):
        original.clear()
        original.extend(content)
    elif isinstance(original, dict):
        restored = {k: _restored(v, saved) for k, (v, saved) in content.items()}
        original.clear()
        original.update(restored)
    elif isinstance(original, set):
        original.clear()
        original.update(content)
    elif isinstance(original, torch.Generator):
        original.set_state(content)
    elif isinstance(original, random.Random):
        original.setstate(content)
    else:
        original.bit_generator.state = content
    return original
