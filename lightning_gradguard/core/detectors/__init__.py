"""Detectors on plain numbers: spikes, divergence, collapse, symptoms."""

from .constant_clipping import CONSTANT_CLIPPING, HARD_CLIPPING, ConstantClippingDetector
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
from .symptoms import (
    DEPTH_DECADES,
    EXPLOSION,
    STAGNANT,
    NormBand,
    Persistence,
    Symptom,
    SymptomDetector,
    depth_profile,
)
