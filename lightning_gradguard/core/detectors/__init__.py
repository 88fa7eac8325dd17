"""Detectors on plain numbers: spikes, divergence, collapse, symptoms."""

from lightning_gradguard.core.detectors.depth import DEPTH_DECADES as DEPTH_DECADES
from lightning_gradguard.core.detectors.depth import depth_profile as depth_profile
from lightning_gradguard.core.detectors.divergence import EVIDENCE_STEPS as EVIDENCE_STEPS
from lightning_gradguard.core.detectors.divergence import MIN_LOSS_RATIO as MIN_LOSS_RATIO
from lightning_gradguard.core.detectors.divergence import CollapseDetector as CollapseDetector
from lightning_gradguard.core.detectors.divergence import DivergenceDetector as DivergenceDetector
from lightning_gradguard.core.detectors.optimizer_health import (
    ADVERSARIAL_DIVERGENCE_RATIO as ADVERSARIAL_DIVERGENCE_RATIO,
)
from lightning_gradguard.core.detectors.optimizer_health import DIVERGENCE_RATIO as DIVERGENCE_RATIO
from lightning_gradguard.core.detectors.optimizer_health import SPIKE_PATIENCE as SPIKE_PATIENCE
from lightning_gradguard.core.detectors.optimizer_health import Anomaly as Anomaly
from lightning_gradguard.core.detectors.optimizer_health import OptimizerHealth as OptimizerHealth
from lightning_gradguard.core.detectors.persistence import Persistence as Persistence
from lightning_gradguard.core.detectors.spike import MAD_TO_STD as MAD_TO_STD
from lightning_gradguard.core.detectors.spike import SpikeDetector as SpikeDetector
from lightning_gradguard.core.detectors.symptoms import EXPLOSION as EXPLOSION
from lightning_gradguard.core.detectors.symptoms import STAGNANT as STAGNANT
from lightning_gradguard.core.detectors.symptoms import Symptom as Symptom
from lightning_gradguard.core.detectors.symptoms import SymptomDetector as SymptomDetector
