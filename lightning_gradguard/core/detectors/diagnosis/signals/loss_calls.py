"""The contract of a loss function: what it is called with, against what it expects."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_gradguard.core.incidents import SymptomCause

REGRESSION = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "difference"})
#: Functions whose result has nothing but the shape of a tensor, such as the labels of a discriminator.
CONSTANTS = frozenset({"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"})
#: Nodes of a graph that change the shape of a tensor and not its values.
_SHAPE_ONLY = (
    *("View", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "Slice", "Transpose", "Permute", "T", "Clone"),
    *("ToCopy", "Expand", "Alias", "Reshape", "ReshapeAlias"),
)
#: Nodes at which a layer begins.
_LAYERS = ("Addmm", "Mm", "Bmm", "Convolution", "MkldnnLinear", "Linear", "Embedding", "NativeLayerNorm")
#: Range of the outputs of a head, by its node.
_RANGES = {
    **{"Sigmoid": (0.0, 1.0), "Hardsigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0), "Tanh": (-1.0, 1.0)},
    **dict.fromkeys(("Relu", "Softplus", "Exp", "Abs"), (0.0, math.inf)),
    **{"Elu": (-1.0, math.inf), "Gelu": (-0.17, math.inf), "Silu": (-0.28, math.inf)},
    "LogSoftmax": (-math.inf, 0.0),
}
#: Nodes of a graph that are searched for the input of a block, and calls of layers after which none is.
MAX_NODES, MAX_SEARCHED = 200, 32
#: Range of a sigmoid of what is between 0 and 1.
_OF_TWO_SIGMOIDS = (0.5, 0.7311)
#: Names of the first two arguments.
_NAMES = (("input", "target"), ("log_probs", "targets"))
#: How far outside of the range targets are not reached, in absolute terms.
_OUTSIDE = 0.05


def arguments_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Returns the answers, the targets, and the other arguments of a call of a loss function by name."""
    found = dict(_signature(function).bind(*args, **kwargs).arguments)
    answer, target = next(names for names in _NAMES if names[0] in found)
    return found.pop(answer), found.pop(target), found


@cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


class _Call(NamedTuple):
    answer: Tensor  # attached to the graph
    target: Tensor
    options: Mapping[str, Any]

    @property
    def values(self) -> Tensor:
        return self.answer.detach()

    @property
    def head(self) -> str:
        return head_node(self.answer)

    def share_out_of(self, low: float, high: float) -> Tensor:
        return ((self.target < low) | (self.target > high)).float().mean()


_Conditions = Iterator[tuple[SymptomCause, Tensor | bool]]


def _of_logits(call: _Call) -> _Conditions:
    values = call.values
    if values.ndim > 1 and values.shape[1] > 1:
        is_simplex = (values >= 0).all(1) & ((values.sum(1) - 1).abs() < 1e-3)
        is_given = call.head in ("Softmax", "Sigmoid")
        yield "softmax_before_loss", is_given or is_simplex.float().mean()


def _of_labels(call: _Call) -> _Conditions:
    if call.answer.ndim > 1 and call.answer.shape[1] == 1:
        yield "single_class", True
    if not call.target.is_floating_point():
        yield "labels_ignored", (call.target == call.options.get("ignore_index", -100)).all()
    elif call.target.ndim > 1:
        yield "labels_ignored", (call.target.sum(1) == 0).all()  # each is of no class


def _of_log_probabilities(call: _Call) -> _Conditions:
    if call.answer.ndim > 1:
        yield "not_log_probabilities", _share_unnormalized(call.values, 1)


def _of_divergences(call: _Call) -> _Conditions:
    values = call.values
    outside = (values > 1e-4).float().mean()
    if values.ndim == 2 and values.shape[1] > 1:
        outside = torch.maximum(outside, _share_unnormalized(values, 1))
    yield "not_log_probabilities", outside
    if not call.options.get("log_target", False):
        yield "targets_out_of_range", call.share_out_of(-1e-4, math.inf)


def _of_alignments(call: _Call) -> _Conditions:
    yield "not_log_probabilities", _share_unnormalized(call.values, -1)


def _of_flags(call: _Call) -> _Conditions:
    yield "targets_out_of_range", call.share_out_of(0, 1)
    if call.head == "Softmax":
        yield "unreachable_targets", _share_of_other_sums(call)


def _of_flag_logits(call: _Call) -> _Conditions:
    if call.head in ("Sigmoid", "Softmax"):
        yield "softmax_before_loss", True
    if call.head == "Relu":
        yield "unreachable_targets", (call.target < 0.5).float().mean()


def _of_regression(call: _Call) -> _Conditions:
    if broadcasts(call.answer, call.target):
        yield "broadcast_targets", True
    if call.head in _RANGES and not _is_sigmoid_twice(call):
        low, high = _RANGES[call.head]
        share = call.share_out_of(low - _OUTSIDE, high + _OUTSIDE)
        yield "unreachable_targets", torch.maximum(share, _share_of_other_sums(call))


def _of_sigmoids(call: _Call) -> _Conditions:
    if _is_sigmoid_twice(call):
        low, high = _OF_TWO_SIGMOIDS
        yield "unreachable_targets", call.share_out_of(low - _OUTSIDE, high + _OUTSIDE)


def _of_all(call: _Call) -> _Conditions:
    if has_single_softmax(call.answer):
        yield "single_class", True


_CONDITIONS: dict[str, tuple[Callable[[_Call], _Conditions], ...]] = {
    "cross_entropy": (_of_logits, _of_labels),
    "nll_loss": (_of_labels, _of_log_probabilities),
    "kl_div": (_of_divergences,),
    "ctc_loss": (_of_alignments,),
    "binary_cross_entropy": (_of_flags, _of_sigmoids),
    "binary_cross_entropy_with_logits": (_of_flags, _of_flag_logits),
    **dict.fromkeys(REGRESSION, (_of_regression, _of_sigmoids)),
}
#: Loss functions whose calls are examined.
LOSSES = frozenset(_CONDITIONS) - {"difference"}


def broken_conditions(
    function: str, answer: Tensor, target: Tensor, options: Mapping[str, Any]
) -> _Conditions:
    """Yields, by cause, the share of a call that breaks a condition, or True if all of it does.

    A subtraction of targets is the function `"difference"`; the answer is attached to the graph.
    """
    call = _Call(answer, target, options)
    for conditions in (*_CONDITIONS[function], _of_all):
        yield from conditions(call)


def _share_unnormalized(values: Tensor, dim: int) -> Tensor:
    """Returns the share of rows whose probabilities do not sum to 1, of their logarithms."""
    return (values.logsumexp(dim).abs() > 0.01).float().mean()


def _share_of_other_sums(call: _Call) -> Tensor:
    """Returns the share of rows behind a softmax whose targets do not sum to 1, as several labels at once."""
    node = _values_of(call.answer.grad_fn)
    if call.head != "Softmax" or not node._saved_result.shape == call.answer.shape == call.target.shape:
        return call.values.new_zeros(())
    sums = call.target.sum(_signed(node._saved_dim))
    return ((sums - 1).abs() > _OUTSIDE).float().mean()


def _is_sigmoid_twice(call: _Call) -> bool:
    return call.head == "Sigmoid" and _name_before(call.answer) in ("Sigmoid", "Softmax")


def loss_of_guessing(function: str, answer: Tensor, options: Mapping[str, Any]) -> float:
    """Returns the loss of giving all classes one probability; NaN for a regression or weighted classes."""
    if options.get("weight") is not None or options.get("pos_weight") is not None:
        return math.nan
    if function in ("cross_entropy", "nll_loss") and answer.ndim > 1 and answer.shape[1] > 1:
        return math.log(answer.shape[1])
    return math.log(2) if function == "binary_cross_entropy_with_logits" else math.nan


def broadcasts(answer: Tensor, target: Tensor) -> bool:
    """True for shapes `(n, 1)` and `(n,)`, n > 1, which broadcast to `(n, n)`."""
    one, other = sorted((answer, target), key=lambda tensor: tensor.ndim)
    n = len(one) if one.ndim == 1 else 0
    return n > 1 and other.ndim == 2 and tuple(other.shape) == (n, 1)


def head_node(answer: Tensor) -> str:
    """Returns the name of the operation that gave a tensor its values, such as `Sigmoid`."""
    node = _values_of(answer.grad_fn)
    return "" if node is None else _name(node)


def _name_before(answer: Tensor) -> str:
    """Returns the name of the operation that gave the argument of the last one its values."""
    node = _values_of(answer.grad_fn)
    before = _values_of(node.next_functions[0][0]) if node is not None and node.next_functions else None
    return "" if before is None else _name(before)


def has_single_softmax(answer: Tensor) -> bool:
    """True if a tensor comes from a softmax over a dimension of size 1, with no layer in between."""
    nodes: list[Any] = [answer.grad_fn]
    seen = 0
    while nodes and seen < 48:
        node = nodes.pop()
        seen += 1
        if node is None or _name(node) in _LAYERS:
            continue
        if _name(node) in ("Softmax", "LogSoftmax"):
            result = node._saved_result
            if result.ndim and result.shape[_signed(node._saved_dim)] == 1:
                return True
        nodes.extend(following for following, _ in node.next_functions)
    return False


def adds_its_input(summands: Sequence[Tensor]) -> bool:
    """True if one of two summands was computed from the other by a layer, as in a residual block.

    Example:
        >>> x, layer = torch.ones(2, 2, requires_grad=True) * 1, torch.nn.Linear(2, 2)
        >>> adds_its_input([x, layer(x)]), adds_its_input([x, x * 2])
        (True, False)
    """
    nodes = [tensor.grad_fn for tensor in summands]
    is_pair = len(nodes) == 2 and None not in nodes
    return is_pair and (_leads_to(*nodes) or _leads_to(*nodes[::-1]))


def _leads_to(node: Any, origin: Any) -> bool:
    """True if a path of a few nodes back from one node to another passes a layer."""
    paths, seen = [(node, False)], 0
    while paths and seen < MAX_NODES:
        now, passes = paths.pop(0)
        seen += 1
        if now is origin and passes:
            return True
        passes = passes or _name(now) in _LAYERS
        paths += [(following, passes) for following, _ in now.next_functions if following is not None]
    return False


def _values_of(node: Any) -> Any:
    while node is not None and _name(node) in _SHAPE_ONLY and node.next_functions:
        node = node.next_functions[0][0]
    return node


def _signed(dim: int) -> int:
    return dim - 2**64 if dim >= 2**63 else dim


def _name(node: Any) -> str:
    return str(node.name()).partition("Backward")[0]


def is_one_signed(gradient: Tensor) -> Tensor:
    """Returns 1 if all nonzero elements have one sign, and 0 otherwise or for a zero gradient."""
    low, high = torch.aminmax(gradient.detach())
    return ((low >= 0) ^ (high <= 0)).float()
