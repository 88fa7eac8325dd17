"""Mistakes in dimensions and shares: statistics of one value, batch and time exchanged, dropout of most."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.detectors.diagnosis.signals import attention
from lightning_gradguard.core.detectors.diagnosis.signals.scalars import DeviceScalars
from lightning_gradguard.core.incidents import SymptomCause

#: Functions that normalize, with the argument that has the shape or the number of groups.
_NORMALIZATIONS = {
    "layer_norm": "normalized_shape",
    "rms_norm": "normalized_shape",
    "group_norm": "num_groups",
}
#: Share of the tokens that are the targets one place earlier, from which on the next one is asked for.
SHIFTED = 0.95
#: Distance from 1 up to which positive numbers over the batch sum to 1, as those of a softmax.
SUMS_TO_ONE = 1e-3
#: Share of attention to padding alone: queries may look at marks of one kind on purpose.
PADDING = 0.75
#: Share that dropout sets to zero, from which on it may be meant for the share that is kept.
MOST = 0.9
#: Mistakes that are kept, and the place of one that is a mistake wherever it is, not after all layers alone.
MAX_FOUND, ANYWHERE = 64, -1


class Dimensions:
    """Finds what a step computes over another dimension than is meant.

    Args:
        scalars: To which numbers are added.
        batch: Tensors of the batch, by which samples and steps of a sequence differ.
        data: Contains tensors that are of the batch, or computed from it alone.

    Example:
        >>> scalars = DeviceScalars()
        >>> dimensions = Dimensions(scalars, [torch.ones(4, 7, 3), torch.arange(4)], data=[])
        >>> dimensions.add_sequence("rnn", torch.ones(4, 7, 3))
        >>> scalars.read(scalars.stacked(torch.device("cpu")).tolist())
        >>> dimensions.mistakes(n_calls=1)
        [('batch_as_time', 'rnn', 1.0)]
    """

    def __init__(self, scalars: DeviceScalars, batch: Sequence[Tensor], data: Container[Tensor]) -> None:
        self._scalars, self._data = scalars, data
        self._found: list[tuple[SymptomCause, str, int, int]] = []
        self._tokens = [t for t in batch if t.ndim == 2 and not (t.is_floating_point() or t.is_complex())]
        labels = {len(t) for t in batch if t.ndim > 0 and t.numel() == len(t)}
        is_one = len(labels) == 1 and all(t.ndim > 0 and {len(t)} == labels for t in batch)
        self._n = labels.pop() if is_one else 0
        self._asks_for_next: Tensor | None = None
        self._looks_back: list[int] = []
        self._normalizes_rows = False
        if len(self._tokens) == 2 and self._tokens[0].shape == self._tokens[1].shape:
            given, asked = self._tokens
            # of windows in the order of their starts, the next one asks for the same
            by_sample, by_window = given[:, 1:] == asked[:, :-1], given[1:] == asked[:-1]
            shifted = [(same.float().mean() > SHIFTED) for same in (by_sample, by_window)]
            self._asks_for_next = (shifted[0] & ~shifted[1]).float()

    def mistakes(self, n_calls: int) -> list[tuple[SymptomCause, str, float]]:
        """Returns causes, layers and the shares of calls at fault, of a step with so many calls of layers.

        Softmaxes over the batch and over classes are those of Sinkhorn, attention to later keys beside one to
        earlier ones that of a network that reads in both directions.
        """
        looks_back = any(self._scalars[index] == 1 for index in self._looks_back)
        is_meant = {"softmax_over_batch": self._normalizes_rows, "inverted_mask": looks_back}
        return [
            (cause, where, self._scalars[index])
            for cause, where, index, after in self._found
            if after in (ANYWHERE, n_calls) and not is_meant.get(cause)
        ]

    def add_call(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Tensor,
        where: str,
        after: int,
    ) -> None:
        """Adds a call of a function `after` so many layers: its result shows over what it was computed."""
        if name in _NORMALIZATIONS:
            over = args[1] if len(args) > 1 else kwargs[_NORMALIZATIONS[name]]
            if (result[0].numel() // over if isinstance(over, int) else math.prod(over)) == 1:
                self._add("single_value", where)
        elif name == "batch_norm" and result.numel() == 2 * result.shape[1]:
            is_of_batch = args[5] if len(args) > 5 else kwargs.get("training", False)
            if is_of_batch:
                self._add("single_value", where, torch.full((), 0.5))
        elif "dropout" in name:
            given = {**dict(zip(("p", "training"), args[1:3], strict=False)), **kwargs}
            if given.get("p", 0.5) >= MOST and given.get("training", True):
                self._add("dropout", where)
        elif name in ("view", "reshape"):
            before, now = list(args[0].shape), list(result.shape)
            # relative attention shifts scores by a view whose last sizes differ by one
            is_other = any(abs(a - b) > 1 for a, b in zip(_long(before), _long(now), strict=False))
            if sorted(before) == sorted(now) and len(_long(now)) > 2 and is_other:
                self._add("view_for_transpose", where, after=ANYWHERE if args[0] in self._data else after)
        elif result.requires_grad and result.ndim > 1 and 0 < self._n == len(result) < result.numel():
            if name.endswith("softmax"):
                dim = args[1] if len(args) > 1 else kwargs.get("dim")
                self._normalizes_rows |= dim is not None and result.ndim == 2 and dim % 2 == 1
                if dim is not None and dim % result.ndim == 0 and result.shape[1] % self._n:
                    self._add("softmax_over_batch", where, after=after if result.ndim == 2 else ANYWHERE)
            elif name.endswith("div") and result.ndim == 2 and _size(args[-1]) == self._n:
                self._normalizes_rows = True
            elif name.endswith("div") and result.ndim == 2 and _size(args[-1]) == result.shape[1]:
                result = result.detach()
                is_over_batch = (result >= 0).all() & ((result.sum(0) - 1).abs() < SUMS_TO_ONE).all()
                self._add("softmax_over_batch", where, is_over_batch, after)

    def add_sequence(self, where: str, sequence: Any) -> None:
        """Adds what a module gets that expects the time as the first dimension and samples as the second."""
        if not isinstance(sequence, Tensor) or sequence.ndim != 3 or sequence.shape[1] == 1:
            return  # packed sequences are sorted by time
        n_times, n = sequence.shape[:2]
        if n_times == self._n and n % n_times:
            self._add("batch_as_time", where)
        elif self._asks_for_next is not None and (n_times, n) == self._tokens[0].shape and n != n_times:
            self._add("batch_as_time", where, self._asks_for_next)

    def add_attention(self, name: str, arguments: Mapping[str, Any], where: str) -> None:
        """Adds attention, whose mask shows which keys it may attend to."""
        if name == "multi_head_attention_forward":
            self.add_sequence(where, arguments["query"])
        if (attended := attention.attended(name, arguments)) is not None:
            padding, later, earlier = attention.inverted(attended, self._tokens)
            asked = 0.5 if self._asks_for_next is None else (0.5 + self._asks_for_next / 2)
            self._add("inverted_mask", where, torch.maximum(PADDING * padding, later * asked))
            self._looks_back.append(self._scalars.add(earlier))

    def _add(
        self, cause: SymptomCause, where: str, share: Tensor | None = None, after: int = ANYWHERE
    ) -> None:
        if len(self._found) < MAX_FOUND:
            index = self._scalars.add(torch.ones(()) if share is None else share)
            self._found.append((cause, where, index, after))


def _size(divisor: Any) -> int:
    return divisor.numel() if isinstance(divisor, Tensor) else 1


def _long(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size > 1]
