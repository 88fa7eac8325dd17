"""Checks of constructor arguments: each returns the value, or raises a `ValueError` that quotes it."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from functools import wraps
from numbers import Real
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def nearest(name: str, known: Iterable[str], before: str = "") -> str:
    """Suggests the nearest of the valid names; empty if none is near.

    Example:
        >>> nearest("patienc", ["patience", "check"], "--nan_rollback.")
        ' Did you mean --nan_rollback.patience?'
        >>> nearest("Gcn", ["GCN", "Graph"])
        ' Did you mean GCN?'
    """
    names = [*known]
    near = [one for one in names if one.lower() == name.lower()] or get_close_matches(name, names, n=1)
    return f" Did you mean {before}{near[0]}?" if near else ""


def with_known_names(function: Callable[P, T]) -> Callable[P, T]:
    """Has a function name the nearest of its arguments where it is called with one that it does not have.

    Example:
        >>> with_known_names(number)("eps", 1.0, at_lest=0)
        Traceback (most recent call last):
        ...
        TypeError: number() has no argument 'at_lest'. Did you mean at_least?
    """
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    owner = function.__qualname__.removesuffix(".__init__")

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in () if takes_any else kwargs.keys() - parameters.keys():
            known = f" It has {', '.join(n for n in parameters if n != 'self')}."
            raise TypeError(f"{owner}() has no argument {name!r}.{nearest(name, parameters) or known}")
        return function(*args, **kwargs)

    return checked


def number(name: str, value: float, *, at_least: float = -math.inf) -> float:
    """Returns a number of at least `at_least`, `inf` included; no text, no bool and no NaN.

    Example:
        >>> number("norm_type", "two", at_least=1)
        Traceback (most recent call last):
        ...
        ValueError: norm_type='two' must be a number of at least 1.
    """
    if not (_is_number(value) and value >= at_least):
        limit = "" if at_least == -math.inf else f" of at least {at_least:g}"
        raise ValueError(f"{name}={value!r} must be a number{limit}.")
    return value


def positive(name: str, value: float) -> float:
    """Returns a finite number above 0."""
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive number.")
    return value


def within(name: str, value: float, interval: str) -> float:
    """Returns a number in an interval, to which its ends belong by its brackets.

    Example:
        >>> within("decay", 1.0, "[0, 1)")
        Traceback (most recent call last):
        ...
        ValueError: decay=1.0 must be in [0, 1).
    """
    low, high = map(float, interval[1:-1].split(","))
    outside = (low if interval[0] == "(" else None, high if interval[-1] == ")" else None)
    if not (_is_number(value) and low <= value <= high) or value in outside:
        raise ValueError(f"{name}={value!r} must be in {interval}.")
    return value


def whole_number(name: str, value: int, *, at_least: int = 1) -> int:
    """Returns an integer of at least `at_least`, which is not a bool.

    Example:
        >>> whole_number("window", 2.5)
        Traceback (most recent call last):
        ...
        ValueError: window=2.5 must be a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {at_least}.")
    return value


def flag(name: str, value: bool) -> bool:
    """Returns a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False.")
    return value


def one_of(name: str, value: Any, *choices: str) -> str:
    """Returns one of the choices."""
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name}={value!r} must be {', '.join(others)} or {last}.")
    return value


def text(name: str, value: Any) -> str | None:
    """Returns a path as text; `None` for none."""
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise ValueError(f"{name}={value!r} must be a path, or None.")
    return None if value is None else os.fspath(value)


def names(name: str, value: Sequence[str] | None) -> tuple[str, ...]:
    """Returns a list of names as a tuple, empty for `None`; a single string is an error."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a list of names, such as [{value!r}].")
    if value is not None and not (
        isinstance(value, (list, tuple, set, frozenset)) and all(isinstance(entry, str) for entry in value)
    ):
        raise ValueError(f"{name}={value!r} must be a list of names.")
    return tuple(value or ())


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
