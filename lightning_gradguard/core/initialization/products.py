"""Changes to the factors of matrix products that are tried as cures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_gradguard.core.initialization.findings import Finding


@dataclass(eq=False)
class NormalizedFactors(TorchFunctionMode):
    """Vectors of unit length in the product of two outputs that gives the logits of so many classes.

    References:
        Chen, Kornblith, Norouzi, Hinton, A Simple Framework for Contrastive Learning of Visual
        Representations, 2020, arXiv:2002.05709.
    """

    n_classes: int
    has_product: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def applied(self) -> AbstractContextManager[None]:
        """Normalizes both factors."""
        return self

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        is_product = getattr(function, "__name__", "").strip("_") in ("matmul", "mm")
        if is_product and all(map(_is_output, args)) and args[1].shape[1] == self.n_classes:
            self.has_product = True
            args = [nn.functional.normalize(x, dim=dim) for x, dim in zip(args, (1, 0), strict=True)]
        return function(*args, **(kwargs or {}))

    def describe(self, finding: Finding, change: str) -> str:
        """Returns the change in words."""
        return (
            "give both factors of the product that makes the logits unit length, x = nn.functional.normalize"
            f"(x, dim=1), and divide the product by a temperature of about 0.1 if by none yet  # {change}"
        )


class MeansOfNeighbours(TorchFunctionMode):
    """Means in place of the sums over neighbours that a product with an adjacency matrix makes."""

    def applied(self) -> AbstractContextManager[None]:
        """Divides the rows of such matrices by their sums."""
        return self

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(function, "__name__", "").strip("_")
        if name in ("matmul", "mm", "bmm") and _sums_neighbours(*args):
            args = [args[0] / args[0].sum(-1, keepdim=True).clamp(min=1), args[1]]
        return function(*args, **(kwargs or {}))

    def describe(self, finding: Finding, change: str) -> str:
        """Returns the change as code."""
        return (
            "take means of neighbours in place of sums, a = a / a.sum(-1, keepdim=True).clamp(min=1) for the "
            "adjacency matrix a, and of nodes, as h.mean(1), where their sum is the answer"
            f"  # {change}"
        )


def _sums_neighbours(a: Any, h: Any) -> bool:
    """True if a square matrix that is not computed from weights is multiplied by what is."""
    if not (isinstance(a, Tensor) and isinstance(h, Tensor) and h.requires_grad and not a.requires_grad):
        return False
    return a.ndim > 1 and a.shape[-1] == a.shape[-2] and a.is_floating_point() and bool((a >= 0).all())


def _is_output(x: Any) -> bool:
    """True of a matrix that is computed from weights, and not a weight itself or its transpose."""
    if not (isinstance(x, Tensor) and x.ndim == 2 and x.requires_grad):
        return False
    return not (x.is_leaf or (x._base is not None and x._base.is_leaf))
