"""What a callback was told to do, for whoever compares runs."""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_gradguard.core.clipping import ClippingPolicy

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
        told = {}
        for name, value in list(given.items())[1:]:
            if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                told.update({inner: plain(v) for inner, v in value.items()})
            elif plain(value) != plain(signature.parameters[name].default):
                told[name] = plain(value)
        made.settings = told
        return made


def plain(value: object) -> Plain:
    """A value as a table and a logger take it; whatever it is, it is told in a line.

    Args:
        value: A number stays one, a list becomes its elements, a policy its class and arguments.

    Example:
        >>> from lightning_gradguard import PercentileClipping
        >>> plain(3), plain(["head", "body"]), plain(PercentileClipping(50.0))
        (3, 'head, body', 'PercentileClipping(percentile=50.0, window=1000)')
    """
    if isinstance(value, Plain):
        return value
    if isinstance(value, ClippingPolicy):
        names = inspect.signature(type(value)).parameters
        shown = [f"{name}={getattr(value, name)!r}" for name in names if hasattr(value, name)]
        text = f"{type(value).__name__}({', '.join(shown)})"
    else:
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return textwrap.shorten(text, 200, placeholder="...")


def hyperparameters_of(callbacks: Sequence[object]) -> dict[str, Plain]:
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
    seen: Counter[str] = Counter()
    for callback in ours:
        kind = type(callback).__name__
        seen[kind] += 1
        owner = kind if seen[kind] == 1 else f"{kind} {seen[kind]}"
        for name, value in callback.settings.items():
            found[f"{owner}.{name}"] = value
    return found
