"""Clipping policies, which decide by how much each gradient is scaled."""

from .context import step_context
from .per_tensor import PerTensorClipping, UnitwiseClipping
from .policy import ClippingPolicy
from .relative_norm import RelativeNormClipping
from .scalars import Scalar, smallest
from .total_norm import GlobalNormClipping, PercentileClipping, ZScoreClipping
