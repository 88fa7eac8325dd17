"""Settings of the callbacks, for tables and loggers that compare runs."""

from __future__ import annotations

import inspect
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

from lightning_gradguard.core.arguments import with_known_names
from lightning_gradguard.core.clipping import ClippingPolicy

Plain = str | int | float | bool


class Configured:
    """A callback whose `settings` are the arguments that differ from their defaults.

    If one of a Trainer is not `verbose`, only interventions are printed.
    """

    settings: Mapping[str, Plain] = {}
    verbose: bool = True

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        if "__init__" in vars(cls):
            cls.__init__ = with_known_names(cls.__init__)  # type: ignore[method-assign]


def non_defaults(callback: type, arguments: Mapping[str, object]) -> dict[str, Plain]:
    """Returns the arguments that differ from the defaults of `__init__`, given the `locals()` in it."""
    values = {
        name: (_plain(arguments[name]), _plain(parameter.default))
        for name, parameter in inspect.signature(callback).parameters.items()
    }
    return {name: value for name, (value, default) in values.items() if value != default}


def _plain(value: object) -> Plain:
    """Returns a number, or one line: a list as its elements, a policy as its class and arguments."""
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
    """Returns the names of the suite's callbacks, and `<callback>.<argument>` for each setting.

    Example:
        >>> from lightning_gradguard import GradientNormMonitor, NaNRollback
        >>> hyperparameters_of([NaNRollback(patience=5), GradientNormMonitor()])
        {'callbacks': 'NaNRollback, GradientNormMonitor', 'NaNRollback.patience': 5}
    """
    own = [callback for callback in callbacks if isinstance(callback, Configured)]
    found: dict[str, Plain] = {"callbacks": ", ".join(type(callback).__name__ for callback in own)}
    seen: Counter[str] = Counter()
    for callback in own:
        kind = type(callback).__name__
        seen[kind] += 1
        owner = kind if seen[kind] == 1 else f"{kind} {seen[kind]}"
        found |= {f"{owner}.{name}": value for name, value in callback.settings.items()}
    return found
