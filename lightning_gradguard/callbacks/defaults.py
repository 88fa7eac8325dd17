"""The five callbacks together, each with its defaults."""

from __future__ import annotations

from lightning_gradguard.callbacks.adaptive_gradient_clipping import AdaptiveGradientClipping
from lightning_gradguard.callbacks.gradient_norm_monitor import GradientNormMonitor
from lightning_gradguard.callbacks.initialization_check import InitializationCheck
from lightning_gradguard.callbacks.learning_rate_backoff import LearningRateBackoff
from lightning_gradguard.callbacks.nan_rollback import NaNRollback
from lightning_gradguard.runtime.lightning_api import Callback

#: The five, by the names that `default_callbacks` and the command line have for them.
DEFAULTS: dict[str, type[Callback]] = {
    "initialization_check": InitializationCheck,
    "gradient_norm_monitor": GradientNormMonitor,
    "nan_rollback": NaNRollback,
    "adaptive_gradient_clipping": AdaptiveGradientClipping,
    "learning_rate_backoff": LearningRateBackoff,
}


def default_callbacks(**replacements: Callback | None) -> list[Callback]:
    """All five callbacks, ready for `Trainer(callbacks=...)`.

    Args:
        **replacements: By name (`initialization_check`, `gradient_norm_monitor`, `nan_rollback`,
            `adaptive_gradient_clipping`, `learning_rate_backoff`): a callback of that class to take in
            place of the default, or `None` to leave it out.

    Returns:
        A fresh list.

    Raises:
        ValueError: If a name is none of the five, or a replacement is of another class.

    Example:
        >>> from lightning_gradguard import NaNRollback, default_callbacks
        >>> callbacks = default_callbacks(
        ...     nan_rollback=NaNRollback(patience=5), learning_rate_backoff=None
        ... )
        >>> len(callbacks)
        4
    """
    for name, callback in replacements.items():
        if name not in DEFAULTS:
            raise ValueError(f"{name!r} is none of the callbacks: {', '.join(DEFAULTS)}.")
        if callback is not None and not isinstance(callback, DEFAULTS[name]):
            raise ValueError(
                f"{name}={callback!r} must be of class {DEFAULTS[name].__name__}, or None to leave it out."
            )
    callbacks = [
        replacements[name] if name in replacements else default() for name, default in DEFAULTS.items()
    ]
    return [callback for callback in callbacks if callback is not None]
