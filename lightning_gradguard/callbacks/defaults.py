"""The callbacks together: each with its defaults, or those that make changes of a training program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from lightning_gradguard.callbacks.adaptive_gradient_clipping import AdaptiveGradientClipping
from lightning_gradguard.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_gradguard.callbacks.initialization_check import InitializationCheck
from lightning_gradguard.callbacks.learning_rate_backoff import LearningRateBackoff
from lightning_gradguard.callbacks.nan_rollback import NaNRollback
from lightning_gradguard.callbacks.training_diagnosis import TrainingDiagnosis
from lightning_gradguard.callbacks.treatment import Treatment
from lightning_gradguard.callbacks.weight_norm_constraint import WeightNormConstraint
from lightning_gradguard.core.arguments import flag, with_known_names
from lightning_gradguard.core.clipping import GlobalNormClipping
from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.runtime.lightning_api import Callback

#: The classes, by their names in `default_callbacks` and on the command line.
DEFAULTS: dict[str, type[Callback]] = {
    "initialization_check": InitializationCheck,
    "gradient_norm_monitor": GradientNormMonitor,
    "training_diagnosis": TrainingDiagnosis,
    "nan_rollback": NaNRollback,
    "adaptive_gradient_clipping": AdaptiveGradientClipping,
    "learning_rate_backoff": LearningRateBackoff,
}


class _Callbacks(list[Callback]):
    """A list that explains what is wrong where a Trainer takes it for one callback."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"a list has no {name!r}: default_callbacks() is a list of callbacks, for "
            "Trainer(callbacks=default_callbacks()), or callbacks=[*default_callbacks(), another]"
        )


@with_known_names
def default_callbacks(
    *,
    initialization_check: InitializationCheck | Literal["default"] | None = "default",
    gradient_norm_monitor: GradientNormMonitor | Literal["default"] | None = "default",
    training_diagnosis: TrainingDiagnosis | Literal["default"] | None = "default",
    nan_rollback: NaNRollback | Literal["default"] | None = "default",
    adaptive_gradient_clipping: AdaptiveGradientClipping | Literal["default"] | None = "default",
    learning_rate_backoff: LearningRateBackoff | Literal["default"] | None = "default",
    verbose: bool = True,
) -> list[Callback]:
    """Returns the callbacks that fit any run, ready for `Trainer(callbacks=...)`.

    Each argument but the last is a callback in place of the default, or `None` for no callback of that class.

    Args:
        initialization_check: A fresh `InitializationCheck()` by default.
        gradient_norm_monitor: A fresh `GradientNormMonitor()` by default.
        training_diagnosis: A fresh `TrainingDiagnosis()` by default.
        nan_rollback: A fresh `NaNRollback()` by default.
        adaptive_gradient_clipping: A fresh `AdaptiveGradientClipping()` by default.
        learning_rate_backoff: A fresh `LearningRateBackoff()` by default.
        verbose: False to print interventions alone: skips, rollbacks, a lower learning rate. Findings and the
            summary at the end of the run are then not printed; files and loggers get them all the same.

    Raises:
        ValueError: If an argument is no instance of its class, such as the class itself, or False.

    Example:
        >>> from lightning_gradguard import NaNRollback, default_callbacks
        >>> callbacks = default_callbacks(
        ...     nan_rollback=NaNRollback(patience=5), learning_rate_backoff=None
        ... )
        >>> len(callbacks)
        5
    """
    chosen: dict[str, Callback | Literal["default"] | None] = {
        "initialization_check": initialization_check,
        "gradient_norm_monitor": gradient_norm_monitor,
        "training_diagnosis": training_diagnosis,
        "nan_rollback": nan_rollback,
        "adaptive_gradient_clipping": adaptive_gradient_clipping,
        "learning_rate_backoff": learning_rate_backoff,
    }
    callbacks = _Callbacks()
    for name, callback in chosen.items():
        default = DEFAULTS[name]
        if isinstance(callback, default):
            callbacks.append(callback)
        elif callback == "default":
            callbacks.append(default())
        elif callback is not None:
            given = f"{type(callback).__name__}(...)" if isinstance(callback, Callback) else repr(callback)
            needed = f"{default.__name__}(...) or one of a subclass, or None to omit it"
            raise ValueError(f"{name}={given} is no {default.__name__}: pass an instance, {needed}.")
    if not flag("verbose", verbose):
        for configured in callbacks:
            configured.verbose = False  # type: ignore[attr-defined]
    return callbacks


def callbacks_of(changes: Sequence[Change]) -> list[Callback]:
    """Returns the callbacks that make changes of a training program, ready for `Trainer(callbacks=...)`.

    Args:
        changes: Changes of any kind but `precision`, which is an argument of the Trainer and ignored here.

    Example:
        >>> from lightning_gradguard import Change, callbacks_of
        >>> changes = [Change("initialize"), Change("clipping", {"max_norm": 0.5})]
        >>> [type(callback).__name__ for callback in callbacks_of(changes)]
        ['Treatment', 'AdaptiveGradientClipping']
    """
    treated = [change for change in changes if change.is_of_treatment]
    callbacks: list[Callback] = [Treatment(treated)] if changes else []
    for change in changes:
        if change.kind == "clipping":
            callbacks.append(AdaptiveGradientClipping(GlobalNormClipping(change["max_norm"])))
        elif change.kind == "weight_norm":
            callbacks.append(WeightNormConstraint(change["max_norm"]))
    return callbacks
