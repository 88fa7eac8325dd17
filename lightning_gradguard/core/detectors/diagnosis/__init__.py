"""Diagnosis of a training run: signals of a sampled step, the symptoms in them, one root for each cause."""

from .coverage import Coverage, Steps, coverage, has_gradient
from .diagnosis import Diagnosis
from .rules import of_first_losses
from .sample import CLIPPED_AT_ALL, Sample, Update
from .signals.dependence import TargetDependence
from .signals.loss_baseline import LossBaselines
from .signals.scalars import is_constant
from .signals.trace import StepTrace
from .symptom import Symptom
