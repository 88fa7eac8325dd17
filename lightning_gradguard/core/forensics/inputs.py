"""Parts of a batch that are far out of range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves_with_path, tree_map

from lightning_gradguard.core.forensics.origin import Origin, in_rows

#: Inputs this large overflow float32 when they are squared and summed a few times.
HUGE_INPUT = 1e6
#: A row of the batch this many times larger than the median row is an outlier.
OUTLIER = 30.0
#: Largest rms of what need not be standardized before all else, as pixels have up to 255, and beside it.
LARGE_RMS, LARGE_BESIDE = 100.0, 10.0


def parts_of(batch: Any) -> dict[str, Tensor]:
    """Returns the tensors of a batch by their places in it, such as `batch[0]`.

    Example:
        >>> import torch
        >>> list(parts_of((torch.ones(1), {"y": torch.ones(1)})))
        ['batch[0]', "batch[1]['y']"]
    """
    leaves = ((path, leaf) for path, leaf in tree_leaves_with_path(batch) if isinstance(leaf, Tensor))
    return {"batch" + "".join(map(str, path)): leaf for path, leaf in leaves}


def huge_inputs(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the largest values of the parts of the batch that may overflow, the largest first."""
    floating = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    highest = ((name, float(part.detach().abs().amax())) for name, part in floating.items())
    return dict(sorted(((n, high) for n, high in highest if high > HUGE_INPUT), key=lambda item: -item[1]))


def parts_out_of_scale(parts: Mapping[str, Tensor]) -> dict[str, float]:
    """Returns the rms of the parts of the batch that are to be standardized, none unless one is far out.

    Example:
        >>> parts_out_of_scale({"batch[0]": torch.full((8, 2), 2000.0), "batch[1]": torch.ones(8)})
        {'batch[0]': 2000.0}
    """
    floating = {name: part for name, part in parts.items() if part.is_floating_point() and part.numel()}
    sizes = ((name, float(part.detach().double().square().mean().sqrt())) for name, part in floating.items())
    found = {name: rms for name, rms in sizes if LARGE_BESIDE < rms < math.inf}
    return found if max(found.values(), default=0.0) > LARGE_RMS else {}


def standardizing(scales: Mapping[str, float]) -> str:
    """Returns the advice to standardize parts of the batch, by their rms.

    Example:
        >>> standardizing({"batch[0]": 255.0, "batch[1]": 2000.0})
        'standardize batch[0] and batch[1], (t - t.mean(0)) / t.std(0): rms 255 and 2e+03 (usual: about 1)'
    """
    sizes = " and ".join(f"{rms:.3g}" for rms in scales.values())
    return f"standardize {' and '.join(scales)}, (t - t.mean(0)) / t.std(0): rms {sizes} (usual: about 1)"


class Rescaled(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operations are given multiples of tensors in place of them, which are left as they are.

    Example:
        >>> x = torch.ones(2)
        >>> with Rescaled([(x, 0.5)]):
        ...     print((x + 1).tolist())
        [1.5, 1.5]
    """

    def __init__(self, factors: Sequence[tuple[Tensor, float]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._multiples = {id(part): (part, part.detach() * factor) for part, factor in factors}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tree_map(lambda leaf: self._multiples.get(id(leaf), (leaf, leaf))[1], (args, kwargs or {}))
        return function(*given[0], **given[1])


def outliers(rows: Sequence[int], parts: Mapping[str, Tensor]) -> list[str]:
    """Describes the parts of the batch that are far larger in the rows at fault than in a usual row."""
    found = []
    for name, part in parts.items():
        if rows and part.is_floating_point() and part.ndim and part.numel() and len(part) > max(rows):
            sizes = _sizes(part)
            ratio = float(sizes[list(rows)].max() / _usual(sizes))
            if ratio > OUTLIER:
                found.append(f"{name} is {ratio:.3g} times larger there than in the median row")
    return found


def or_bad_input(origin: Origin, parts: Mapping[str, Tensor]) -> Origin:
    """Returns the origin, or the part of the batch that is huge or has rows far out of range, if one is.

    Example:
        >>> import torch
        >>> part = torch.ones(8, 2)
        >>> part[3] = -9999.0
        >>> or_bad_input(Origin("forward_pass", detail="A"), {"batch[0]": part}).detail
        'A: batch[0] holds values up to 9999 in row 3, where it is 1e+04 times larger than as a rule.'
    """
    huge = huge_inputs(parts)
    rows = {name: outlying_rows(part) for name, part in parts.items() if part.is_floating_point()}
    name = next(iter(huge), None) or next((name for name, found in rows.items() if found), None)
    if name is None:
        return replace(origin, detail=f"{origin.detail}.")
    high = float(parts[name].detach().abs().amax())
    detail = f"{origin.detail}: {name} holds values up to {high:.4g}"
    found = rows.get(name, {})
    if found:
        detail += f"{in_rows(found)}, where it is {max(found.values()):.3g} times larger than as a rule"
    where = tuple(huge) or (name,)
    return replace(origin, cause="bad_input", where=where, rows=tuple(found), detail=f"{detail}.")


def described_outliers(parts: Mapping[str, Tensor]) -> list[str]:
    """Describes the rows of the batch that are far larger than the median row."""
    found = {name: outlying_rows(part) for name, part in parts.items() if part.is_floating_point()}
    return [
        f"{name} is up to {max(rows.values()):.3g} times larger{in_rows(rows)} than in the median row"
        for name, rows in found.items()
        if rows
    ]


def outlying_rows(part: Tensor) -> dict[int, float]:
    """Returns the first ten rows that are outliers, with their size relative to the median row."""
    if part.ndim == 0 or not part.numel():
        return {}
    ratios = (sizes := _sizes(part)) / _usual(sizes)
    return {row: float(ratios[row]) for row in (ratios > OUTLIER).nonzero().flatten()[:10].tolist()}


def _sizes(part: Tensor) -> Tensor:
    return part.detach().double().abs().reshape(len(part), -1).amax(1)


def _usual(sizes: Tensor) -> Tensor:
    """Returns the median size of the rows that are not 0: most labels and padded rows are."""
    above = sizes[sizes > 0]
    return above.median() if above.numel() else torch.ones_like(sizes.amax())
