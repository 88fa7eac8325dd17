"""PyTorch Lightning callbacks against vanishing and exploding gradients."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_gradguard.callbacks.adaptive_gradient_clipping import AdaptiveGradientClipping
    from lightning_gradguard.callbacks.defaults import callbacks_of, default_callbacks
    from lightning_gradguard.callbacks.gradient_norm_monitor import GradientNormMonitor
    from lightning_gradguard.callbacks.initialization_check import InitializationCheck
    from lightning_gradguard.callbacks.learning_rate_backoff import LearningRateBackoff
    from lightning_gradguard.callbacks.nan_rollback import NaNRollback
    from lightning_gradguard.callbacks.training_diagnosis import TrainingDiagnosis
    from lightning_gradguard.callbacks.treatment import Treatment
    from lightning_gradguard.callbacks.weight_norm_constraint import WeightNormConstraint
    from lightning_gradguard.core.clipping import (
        ClippingPolicy,
        GlobalNormClipping,
        PercentileClipping,
        PerTensorClipping,
        RelativeNormClipping,
        UnitwiseClipping,
        ZScoreClipping,
    )
    from lightning_gradguard.core.incidents import Incident, TrainingDivergedError
    from lightning_gradguard.core.initialization import InitializationError
    from lightning_gradguard.core.norms import Gradients, Measurement
    from lightning_gradguard.core.remedies.changes import Change
    from lightning_gradguard.core.training_guard import TrainingGuard
    from lightning_gradguard.runtime.steps.step import Step
    from lightning_gradguard.runtime.steps.step_callback import StepCallback
    from lightning_gradguard.treatment.result import TreatmentResult
    from lightning_gradguard.treatment.treat import treat
    from lightning_gradguard.treatment.trials.program import TreatmentError

__version__ = "0.6.0"

__all__ = [
    "AdaptiveGradientClipping",
    "Change",
    "ClippingPolicy",
    "GlobalNormClipping",
    "GradientNormMonitor",
    "Gradients",
    "Incident",
    "InitializationCheck",
    "InitializationError",
    "LearningRateBackoff",
    "Measurement",
    "NaNRollback",
    "PerTensorClipping",
    "PercentileClipping",
    "RelativeNormClipping",
    "Step",
    "StepCallback",
    "TrainingDiagnosis",
    "TrainingDivergedError",
    "TrainingGuard",
    "Treatment",
    "TreatmentError",
    "TreatmentResult",
    "UnitwiseClipping",
    "WeightNormConstraint",
    "ZScoreClipping",
    "callbacks_of",
    "default_callbacks",
    "treat",
]

_HOME = {
    "AdaptiveGradientClipping": "callbacks.adaptive_gradient_clipping",
    "Change": "core.remedies.changes",
    "ClippingPolicy": "core.clipping",
    "GlobalNormClipping": "core.clipping",
    "GradientNormMonitor": "callbacks.gradient_norm_monitor",
    "Gradients": "core.norms",
    "Incident": "core.incidents",
    "InitializationCheck": "callbacks.initialization_check",
    "InitializationError": "core.initialization",
    "LearningRateBackoff": "callbacks.learning_rate_backoff",
    "Measurement": "core.norms",
    "NaNRollback": "callbacks.nan_rollback",
    "PerTensorClipping": "core.clipping",
    "PercentileClipping": "core.clipping",
    "RelativeNormClipping": "core.clipping",
    "Step": "runtime.steps.step",
    "StepCallback": "runtime.steps.step_callback",
    "TrainingDiagnosis": "callbacks.training_diagnosis",
    "TrainingDivergedError": "core.incidents",
    "TrainingGuard": "core.training_guard",
    "Treatment": "callbacks.treatment",
    "TreatmentError": "treatment.trials.program",
    "TreatmentResult": "treatment.result",
    "UnitwiseClipping": "core.clipping",
    "WeightNormConstraint": "callbacks.weight_norm_constraint",
    "ZScoreClipping": "core.clipping",
    "callbacks_of": "callbacks.defaults",
    "default_callbacks": "callbacks.defaults",
    "treat": "treatment.treat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
