"""Clipping policies, which decide by how much each gradient is scaled."""

from .per_tensor import PerTensorClipping, UnitwiseClipping
from .policy import ClippingPolicy, Scalar
from .total_norm import GlobalNormClipping, PercentileClipping, ZScoreClipping
