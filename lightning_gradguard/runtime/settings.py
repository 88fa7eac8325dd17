"""What a callback was told to do, for whoever compares runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

Plain = str | int | float | bool


class Configured:
    """Knows the arguments that it was made with.

    Attributes:
        settings: Those that differ from their defaults.

    Example:
        >>> class Brake(Configured):
        ...     def __init__(self, force: float = 1.0, wheels: tuple[str, ...] = ()) -> None: ...
        >>> Brake(wheels=("left", "right")).settings
        {'wheels': 'left, right'}
    """

    settings: Mapping[str, Plain]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Look at the arguments on their way to `__init__`."""
        made = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        try:
            given = signature.bind_partial(made, *args, **kwargs).arguments
        except TypeError:  # `__init__` is about to say it in its own words
            given = {}
        made.settings = {
            name: plain(value)
            for name, value in given.items()
            if value is not made and value != signature.parameters[name].default
        }
        return made


def plain(value: object) -> Plain:
    """A value as a table and a logger take it.

    Args:
        value: A number stays one, a list becomes its elements, an object its class and arguments.

    Example:
        >>> from lightning_gradguard import PercentileClipping
        >>> plain(3), plain(["head", "body"]), plain(PercentileClipping(50.0))
        (3, 'head, body', 'PercentileClipping(percentile=50.0, window=1000)')
    """
    if isinstance(value, Plain):
        return value
    if isinstance(value, Sequence):
        return ", ".join(map(str, value))
    names = inspect.signature(type(value)).parameters
    shown = [f"{name}={getattr(value, name)!r}" for name in names if hasattr(value, name)]
    return f"{type(value).__name__}({', '.join(shown)})"


def settings_of(callbacks: Sequence[object]) -> dict[str, Plain]:
    """Which callbacks of the suite there are, and what they were told.

    Args:
        callbacks: All of a Trainer's.

    Returns:
        `callbacks`, their names; and `<callback>.<argument>` for what is not a default.

    Example:
        >>> from lightning_gradguard import GradientNormMonitor, NaNRollback
        >>> settings_of([NaNRollback(patience=5), GradientNormMonitor()])
        {'callbacks': 'NaNRollback, GradientNormMonitor', 'NaNRollback.patience': 5}
    """
    ours = [callback for callback in callbacks if isinstance(callback, Configured)]
    found: dict[str, Plain] = {"callbacks": ", ".join(type(callback).__name__ for callback in ours)}
    for callback in ours:
        for name, value in callback.settings.items():
            found[f"{type(callback).__name__}.{name}"] = value
    return found
