"""Detectors on plain numbers: spikes, divergence, collapse, vanishing and exploding gradients."""

from .constant_clipping import CONSTANT_CLIPPING, HARD_CLIPPING, USUAL_UPDATE, ConstantClippingDetector
from .depth import DEPTH_DECADES, depth_profile
from .norm_band import ABOVE_START, EXPLOSION, Explosion, NormBand
from .optimizer_health import (
    ADVERSARIAL_DIVERGENCE_RATIO,
    DIVERGENCE_RATIO,
    EVIDENCE_STEPS,
    MIN_LOSS_RATIO,
    Anomaly,
    CollapseDetector,
    DivergenceDetector,
    OptimizerHealth,
)
from .spike import MAD_TO_STD, SpikeAlarm, SpikeDetector
