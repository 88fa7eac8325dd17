"""Hooks that copies of a module do not take along."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class UncopiedHook:
    """A hook of a module while it is measured: in a copy of the module, or a pickle, it does nothing.

    A training step may copy layers, as for an average of weights; what a hook records cannot be copied.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook = hook

    def __call__(self, *args: Any) -> Any:
        """Returns what the hook returns."""
        return self._hook(*args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Callable[..., Any]]]:
        return UncopiedHook, (_do_nothing,)


def _do_nothing(*_: Any) -> None:
    return None
