"""Checks of constructor arguments: each returns the value, or raises a `ValueError` that quotes it."""

from __future__ import annotations

import math
from collections.abc import Sequence


def positive(name: str, value: float) -> float:
    """Returns a finite number above 0."""
    if not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise ValueError(f"{name}={value!r} must be a positive number.")
    return value


def decay_rate(name: str, value: float) -> float:
    """Returns a number in [0, 1), as the decay of a running mean."""
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} must be in [0, 1).")
    return value


def fraction(name: str, value: float) -> float:
    """Returns a number in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value!r} must be in (0, 1].")
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


def names(name: str, value: Sequence[str] | None) -> tuple[str, ...]:
    """Returns a list of names as a tuple, empty for `None`; a single string is an error."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a list of names, such as [{value!r}].")
    return tuple(value or ())
