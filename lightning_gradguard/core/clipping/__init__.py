"""Clipping policies, which decide by how much each gradient is scaled."""

from lightning_gradguard.core.clipping.global_norm import GlobalNormClipping as GlobalNormClipping
from lightning_gradguard.core.clipping.per_tensor import PerTensorClipping as PerTensorClipping
from lightning_gradguard.core.clipping.percentile import PercentileClipping as PercentileClipping
from lightning_gradguard.core.clipping.policy import ClippingPolicy as ClippingPolicy
from lightning_gradguard.core.clipping.scalar import Scalar as Scalar
from lightning_gradguard.core.clipping.unitwise import UnitwiseClipping as UnitwiseClipping
from lightning_gradguard.core.clipping.z_score import ZScoreClipping as ZScoreClipping
