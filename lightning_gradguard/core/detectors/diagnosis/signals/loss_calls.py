"""The contract of a loss function: what it is called with, against what it expects."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_gradguard.core.incidents import SymptomCause

#: Loss functions whose calls are examined.
LOSSES = frozenset(
    {
        *("cross_entropy", "nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
        *("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "ctc_loss"),
    }
)
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


def broken_conditions(
    function: str, answer: Tensor, target: Tensor, options: Mapping[str, Any]
) -> Iterator[tuple[SymptomCause, Tensor | bool]]:
    """Yields, by cause, the share of a call that breaks a condition, or True if all of it does.

    A subtraction of targets is the function `"difference"`; the answer is attached to the graph.
    """
    head = head_node(answer)
    values = answer.detach()
    if function == "cross_entropy" and values.ndim > 1 and values.shape[1] > 1:
        sums = values.sum(1)
        is_simplex = ((values >= 0).all(1) & ((sums - 1).abs() < 1e-3)).float().mean()
        yield "softmax_before_loss", True if head in ("Softmax", "Sigmoid") else is_simplex
    if function in ("cross_entropy", "nll_loss") and values.ndim > 1 and values.shape[1] == 1:
        yield "single_class", True
    if function in ("cross_entropy", "nll_loss") and not target.is_floating_point():
        yield "labels_ignored", (target == options.get("ignore_index", -100)).all()
    if function == "nll_loss" and values.ndim > 1:
        yield "not_log_probabilities", (values.logsumexp(1).abs() > 0.01).float().mean()
    if function == "kl_div":
        outside = (values > 1e-4).float().mean()
        if values.ndim == 2 and values.shape[1] > 1:
            outside = torch.maximum(outside, (values.logsumexp(1).abs() > 0.01).float().mean())
        yield "not_log_probabilities", outside
        if not options.get("log_target", False):
            yield "targets_out_of_range", (target < -1e-4).float().mean()
    if function == "ctc_loss":
        yield "not_log_probabilities", (values.logsumexp(-1).abs() > 0.01).float().mean()
    if function == "binary_cross_entropy_with_logits" and head in ("Sigmoid", "Softmax"):
        yield "softmax_before_loss", True
    if function.startswith("binary_cross_entropy"):
        yield "targets_out_of_range", ((target < 0) | (target > 1)).float().mean()
    if function == "binary_cross_entropy_with_logits" and head == "Relu":
        yield "unreachable_targets", (target < 0.5).float().mean()
    if has_single_softmax(answer):
        yield "single_class", True
    if function in REGRESSION and broadcasts(values, target):
        yield "broadcast_targets", True
    is_twice = head == "Sigmoid" and _name_before(answer) in ("Sigmoid", "Softmax")
    if (function in REGRESSION and head in _RANGES) or (function == "binary_cross_entropy" and is_twice):
        low, high = _OF_TWO_SIGMOIDS if is_twice else _RANGES[head]
        yield "unreachable_targets", ((target < low - _OUTSIDE) | (target > high + _OUTSIDE)).float().mean()


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
            result, dim = node._saved_result, node._saved_dim
            dim = dim - 2**64 if dim >= 2**63 else dim
            if result.ndim and result.shape[dim] == 1:
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


def _name(node: Any) -> str:
    return str(node.name()).partition("Backward")[0]


def is_one_signed(gradient: Tensor) -> Tensor:
    """Returns 1 if all nonzero elements have one sign, and 0 otherwise or for a zero gradient."""
    low, high = torch.aminmax(gradient.detach())
    return ((low >= 0) ^ (high <= 0)).float()
