"""Detectors on plain numbers: spikes, divergence, collapse, symptoms."""

from lightning_gradguard.core.detectors.divergence import LEAST_RISE as LEAST_RISE
from lightning_gradguard.core.detectors.divergence import STEPS as STEPS
from lightning_gradguard.core.detectors.divergence import CollapseDetector as CollapseDetector
from lightning_gradguard.core.detectors.divergence import DivergenceDetector as DivergenceDetector
from lightning_gradguard.core.detectors.spike import MAD_TO_STD as MAD_TO_STD
from lightning_gradguard.core.detectors.spike import SpikeDetector as SpikeDetector
from lightning_gradguard.core.detectors.symptoms import DEPTH_DECADES as DEPTH_DECADES
from lightning_gradguard.core.detectors.symptoms import EXPLOSION as EXPLOSION
from lightning_gradguard.core.detectors.symptoms import STAGNANT as STAGNANT
from lightning_gradguard.core.detectors.symptoms import Persistence as Persistence
from lightning_gradguard.core.detectors.symptoms import Symptom as Symptom
from lightning_gradguard.core.detectors.symptoms import SymptomDetector as SymptomDetector
from lightning_gradguard.core.detectors.symptoms import depth_profile as depth_profile
