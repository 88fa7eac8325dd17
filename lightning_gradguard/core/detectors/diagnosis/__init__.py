"""Diagnosis of a training run: signals of a sampled step, the findings in them, one root for each cause."""

from .coverage import Coverage, Steps, coverage, has_gradient
from .diagnosis import Diagnosis
from .findings import Finding
from .sample import Sample, Update
from .signals.loss_baseline import LossBaselines
from .signals.trace import StepTrace

__all__ = [
    "Coverage",
    "Diagnosis",
    "Finding",
    "LossBaselines",
    "Sample",
    "StepTrace",
    "Steps",
    "Update",
    "coverage",
    "has_gradient",
]
