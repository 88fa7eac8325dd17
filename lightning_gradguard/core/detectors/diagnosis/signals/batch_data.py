"""Tensors of a step that are of the batch, or computed from it alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_gradguard.core.detectors.diagnosis.signals import loss_calls

#: Functions whose results have nothing of their arguments but the shape.
CREATIONS = (*loss_calls.CONSTANTS, "zeros")
#: Functions by which a mask selects numbers, and compares them with nothing of the batch.
SELECTIONS = ("mul", "rmul", "multiply", "div", "truediv", "where", "getitem", "masked_select")


class BatchData:
    """Recognizes tensors that are of the batch, or computed from it alone.

    Args:
        parts: The tensors of the batch.

    Attributes:
        is_met: True once what the network gives was compared, or combined, with the batch.
    """

    def __init__(self, parts: Iterable[Tensor]) -> None:
        self.is_met = False
        self._known = WeakValueDictionary({id(tensor): tensor for tensor in parts})
        self._masks: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
        self._made: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

    def __contains__(self, tensor: object) -> bool:
        return self._known.get(id(tensor)) is tensor

    def add_call(self, name: str, given: Sequence[Tensor], result: Tensor) -> None:
        """Adds what was computed; masks that select what is combined with them do not count as met."""
        if name in CREATIONS:
            self._made[id(result)] = result
        of_data = [tensor for tensor in given if tensor in self]
        if len(of_data) == len(given) > 0 and name not in CREATIONS and not result.requires_grad:
            self._known[id(result)] = result
            if result.dtype == torch.bool or all(map(self._is_mask, given)):
                self._masks[id(result)] = result
        elif any(tensor.grad_fn is not None for tensor in given):
            self.is_met |= any(not (name in SELECTIONS and self._is_mask(tensor)) for tensor in of_data)

    def is_made(self, tensor: Tensor) -> bool:
        """True for a tensor of zeros or the like, as the first state of a recurrence."""
        return self._made.get(id(tensor)) is tensor

    def _is_mask(self, tensor: Tensor) -> bool:
        return tensor.dtype == torch.bool or self._masks.get(id(tensor)) is tensor
