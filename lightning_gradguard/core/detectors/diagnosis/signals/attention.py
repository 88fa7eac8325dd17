"""Attention and gates: rows of weights of which one is nearly 1, by any function, and inverted masks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

#: Functions that apply a softmax to scores, with the scores or what they follow from among their arguments.
FUNCTIONS = frozenset({"softmax", "scaled_dot_product_attention", "multi_head_attention_forward"})
#: Keys below which a row is not examined; samples of the batch that are, and those with one row each.
MIN_KEYS, MAX_SAMPLES, MAX_ROWS = 4, 4, 256
#: Largest weight of a row from which on no gradient passes the softmax.
ONE_HOT = 0.999
#: Score up to which a key is masked.
MASKED = -1e8
#: Range of tokens beyond which they are no flags.
FLAGS = 3
#: Rows below which a share means nothing.
MIN_ROWS = 16


def arguments_of(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the arguments of a call of one of `FUNCTIONS` by name."""
    if function.__name__ == "multi_head_attention_forward":
        return dict(inspect.signature(function).bind(*args, **kwargs).arguments)
    names = ("input", "dim") if function.__name__ == "softmax" else ("query", "key", "value", "attn_mask")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def saturated_rows(name: str, arguments: Mapping[str, Any], result: Any) -> Tensor | None:
    """Returns the share of rows whose largest weight is nearly 1, of those with several keys; shape `()`.

    Returns:
        `None` for a softmax that is not over the last of two dimensions or more, and for sharded tensors;
        NaN for too few rows.

    Example:
        >>> scores = 100 * torch.eye(8).repeat(2, 1, 1)
        >>> saturated_rows("softmax", {"input": scores, "dim": -1}, scores.softmax(-1))
        tensor(1.)
    """
    if isinstance(result, DTensor):
        return None  # sharded scores would need a collective
    with torch.no_grad():
        if name == "softmax":
            scores = arguments["input"].detach()
            if scores.ndim < 2 or arguments.get("dim") not in (-1, scores.ndim - 1):
                return None
            weights = result.detach()
        else:
            query, key = _projected(arguments) if name == "multi_head_attention_forward" else _pair(arguments)
            scores = (arguments.get("scale") or query.shape[-1] ** -0.5) * query @ key.transpose(-1, -2)
            mask = _mask(arguments, scores)
            scores = scores if mask is None else scores + mask
            weights = scores.softmax(-1)
        n_samples = MAX_SAMPLES if scores.ndim > 2 else MAX_ROWS
        scores, weights = scores[:n_samples], weights[:n_samples]
        several = (scores > MASKED).sum(-1) >= MIN_KEYS
        n = several.sum()
        share = ((weights.amax(-1) > ONE_HOT) & several).sum() / n
        found: Tensor = torch.where(n < MIN_ROWS, torch.nan, share)
        return found


def attended(name: str, arguments: Mapping[str, Any]) -> Tensor | None:
    """Returns which keys a query may attend to, shape `(n, queries, keys)`, of some samples.

    A mask that is the same for all samples, or queries, has size 1 there. `None` without a mask.
    """
    if name == "softmax":
        scores = arguments["input"].detach()[:MAX_SAMPLES]
        is_over_keys = scores.ndim > 2 and arguments.get("dim") in (-1, scores.ndim - 1)
        return _of_any_head(scores > MASKED) if is_over_keys else None
    # True means "attend" to one function and "do not attend" to the others
    sign = name == "scaled_dot_product_attention"
    found = None
    if (mask := arguments.get("attn_mask")) is not None:
        may = mask == sign if mask.dtype == torch.bool else mask > MASKED
        if may.ndim == 3 and not sign:
            may = may.reshape(-1, arguments["num_heads"], *may.shape[1:])
        found = may[None] if may.ndim == 2 else _of_any_head(may[:MAX_SAMPLES])
    if (padding := arguments.get("key_padding_mask")) is not None:
        may = ~padding if padding.dtype == torch.bool else padding > MASKED
        may = may[:MAX_SAMPLES, None]
        found = may if found is None else found & may
    return found


def _of_any_head(may: Tensor) -> Tensor:
    return may if may.ndim == 3 else may.flatten(1, -3).any(1)


def inverted(attended: Tensor, tokens: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns if attention is to padding alone, to later keys alone, and to earlier ones alone, shape `()`.

    Example:
        >>> inverted(torch.ones(1, 4, 4, dtype=torch.bool).triu(), [])
        (tensor(0.), tensor(1.), tensor(0.))
        >>> tokens = torch.tensor([[5, 9, 3, 0, 0]])
        >>> [inverted(attended[:, None], [tokens])[0].item() for attended in (tokens == 0, tokens > 0)]
        [1.0, 0.0]
    """
    n_queries, n_keys = attended.shape[-2:]
    to_padding = to_later = to_earlier = attended.new_zeros((), dtype=torch.bool)
    if n_queries == n_keys >= MIN_KEYS:
        later, earlier = attended.triu(1).any(), attended.tril(-1).any()
        to_later, to_earlier = later & ~earlier, earlier & ~later
    may = attended.any(1)
    for each in tokens:
        each = each[:MAX_SAMPLES]
        if each.shape == may.shape:
            low, high = each.min(), each.max()
            is_one = torch.where(may, each, low).max() == torch.where(may, each, high).min()
            apart = torch.where(may, low, each).max() - torch.where(may, high, each).min()
            to_padding = to_padding | (is_one & (apart >= FLAGS))
    return to_padding.float(), to_later.float(), to_earlier.float()


def _pair(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    query, key = arguments["query"].detach()[:MAX_SAMPLES], arguments["key"].detach()[:MAX_SAMPLES]
    if key.ndim > 3 and key.shape[-3] != query.shape[-3]:  # grouped queries
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    return query, key


def _projected(arguments: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Returns queries and keys of `nn.MultiheadAttention`, shape `(n, heads, time, width)`."""
    width, heads = arguments["embed_dim_to_check"], arguments["num_heads"]
    weight, bias = arguments["in_proj_weight"], arguments["in_proj_bias"]
    separate: Sequence[Any] = (arguments.get("q_proj_weight"), arguments.get("k_proj_weight"))
    matrices = separate if weight is None else weight.split(width)[:2]
    biases = (None, None) if bias is None else bias.split(width)[:2]
    found = []
    for x, matrix, shift in zip((arguments["query"], arguments["key"]), matrices, biases, strict=True):
        x = x[:, :MAX_SAMPLES].detach() if x.ndim == 3 else x[:, None].detach()
        projected = torch.nn.functional.linear(x, matrix, shift)
        found.append(projected.view(*projected.shape[:2], heads, -1).permute(1, 2, 0, 3))
    return found[0], found[1]


def _mask(arguments: Mapping[str, Any], scores: Tensor) -> Tensor | None:
    """Returns what a mask adds to the scores."""
    if arguments.get("is_causal") and arguments.get("attn_mask") is None:
        return scores.new_full(scores.shape[-2:], -torch.inf).triu(1)
    mask = arguments.get("attn_mask")
    if mask is None:
        return None
    mask = mask if mask.ndim < 4 else mask[:MAX_SAMPLES]
    assert isinstance(mask, Tensor)
    if mask.dtype != torch.bool:
        return mask if mask.ndim != 3 else mask.reshape(-1, *scores.shape[-3:])[:MAX_SAMPLES]
    # True means "attend" to one function and "do not attend" to the other
    blocked = mask if "num_heads" in arguments else ~mask
    return torch.zeros_like(scores).masked_fill(blocked, -torch.inf)
