"""Strict JSON, which has no NaN: a nonfinite number is a string."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(content: Any, *, indent: int | None = None, digits: int | None = None) -> str:
    """Returns plain data as strict JSON, with `"nan"`, `"inf"` and `"-inf"` for nonfinite numbers.

    Example:
        >>> to_json({"loss": [1, float("nan")]})
        '{"loss": [1, "nan"]}'
    """
    return json.dumps(_strict(content, digits), indent=indent, allow_nan=False)


def _strict(value: Any, digits: int | None) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(inner, digits) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(inner, digits) for inner in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        return value if digits is None else float(f"{value:.{digits}g}")
    return value
