"""Detectors on plain numbers: spikes, divergence, collapse, vanishing and exploding gradients."""

from .constant_clipping import (
    CONSTANT_CLIPPING,
    FAR_CLIPPING,
    FAR_IF_TOO_LARGE,
    HARD_CLIPPING,
    NEARLY_ALL,
    USUAL_UPDATE,
    ConstantClippingDetector,
    describe_clipping,
    percent,
)
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
