"""The change of gradients from the last layer to the first."""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Decades that gradients may lose or gain from the last layer to the first.
DEPTH_DECADES = 3.0
#: Layers that a depth profile needs.
MIN_LAYERS = 4


def depth_profile(grad_norms: Sequence[float], weight_norms: Sequence[float]) -> float:
    """Returns the decades by which gradients, relative to weights, shrink from the last layer to the first.

    The slope of a line through `log10(grad_norm / weight_norm)` over depth, times the depth. Above 3 they
    vanish, below -3 they explode.

    Args:
        grad_norms: Norms of the gradients of weight matrices, first layer first, without the output layer.
        weight_norms: Norms of these weights.

    Returns:
        The decades; `inf` if gradients of the first layers are zero while later ones are not; 0 with fewer
        than 4 layers or if a gradient is nonfinite.

    Example:
        >>> round(depth_profile([1e-6, 1e-4, 1e-2, 1.0], [1.0] * 4), 6)
        6.0
    """
    pairs = [(g, w) for g, w in zip(grad_norms, weight_norms, strict=True) if w > 0]
    if len(pairs) < MIN_LAYERS or not all(math.isfinite(g) for g, _ in pairs):
        return 0.0
    if pairs[0][0] == 0 and any(g > 0 for g, _ in pairs):
        return math.inf
    heights = [math.log10(g / w) if g > 0 else None for g, w in pairs]
    points = [(float(depth), height) for depth, height in enumerate(heights) if height is not None]
    if len(points) < MIN_LAYERS:
        return 0.0
    return slope(points) * (len(pairs) - 1)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Returns the slope of the least-squares line through the points."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0
