"""Preservation of random numbers, and of everything that a forward pass may change in a module."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradguard.core.snapshots.buffers import BufferCopies

_INTERNAL = frozenset(nn.Module().__dict__)


def rng_state() -> dict[str, Any]:
    """Returns the state of every random number generator that training uses.

    Generators of GPUs are omitted until CUDA is in use: reading them would initialize it, and processes that
    are forked later could not use it.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores a result of `rng_state`."""
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


@contextmanager
def preserve_state(module: nn.Module) -> Iterator[None]:
    """Restores on exit the buffers, random numbers, training modes and plain attributes of a module.

    Weights and their `.grad` are not included: a forward pass does not write them.

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
    owners = [(m, m.training, {k: _copied(v) for k, v in _attributes(m).items()}) for m in module.modules()]
    try:
        yield
    finally:
        buffers.restore()
        set_rng_state(random_numbers)
        for owner, mode, saved in owners:
            owner.training = mode
            for key in _attributes(owner).keys() - saved.keys():
                del owner.__dict__[key]
            for key, (original, content) in saved.items():
                owner.__dict__[key] = _restored(original, content)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Returns plain attributes of a module, such as the states of a metric or a list of outputs."""
    types = (Tensor, list, dict, set, deque, int, float, bool, str, type(None))
    return {
        key: value
        for key, value in module.__dict__.items()
        if key not in _INTERNAL and isinstance(value, types)
    }


def _copied(value: Any) -> tuple[Any, Any]:
    content = value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)
    return value, content


def _restored(original: Any, content: Any) -> Any:
    """Returns the original object with the copied content."""
    if isinstance(original, Tensor):
        with torch.no_grad():
            original.copy_(content)
    elif isinstance(original, (list, deque)):
        original.clear()
        original.extend(content)
    elif isinstance(original, (dict, set)):
        original.clear()
        original.update(content)
    return original
