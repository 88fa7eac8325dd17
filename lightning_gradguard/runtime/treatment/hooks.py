"""Code that runs after a hook of a LightningModule, in its next call alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl


def call_after(pl_module: pl.LightningModule, hook: str, act: Callable[..., None]) -> None:
    """Calls `act` after the module's hook, with its result and arguments, the next time that it is called.

    Hooks of the callbacks come too early, before the module has its layers, or too late, after its optimizers
    are restored. `act` is a function, and no bound method, so that a copy of the module copies nothing else.
    """
    stop_calling_after(pl_module, hook)  # a run that ended with an exception before the hook was called
    vars(pl_module)[hook] = _Once(pl_module, hook, act)


def stop_calling_after(pl_module: pl.LightningModule, *hooks: str) -> None:
    """Restores hooks that were not called."""
    for hook in hooks:
        replaced = vars(pl_module).get(hook)
        if isinstance(replaced, _Once):
            replaced.restore()


class _Once:
    """The hook and the code after it, in place of the hook."""

    def __init__(self, pl_module: pl.LightningModule, hook: str, act: Callable[..., None]) -> None:
        self._module = pl_module
        self._hook = hook
        self._act = act
        self._own = vars(pl_module).get(hook)

    @property
    def __code__(self) -> Any:
        """The code of `__call__`, which Lightning compares to find that a hook is overridden."""
        return type(self).__call__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.restore()
        result = getattr(self._module, self._hook)(*args, **kwargs)
        self._act(result, *args)
        return result

    def restore(self) -> None:
        """Restores the hook."""
        del vars(self._module)[self._hook]
        if self._own is not None:
            vars(self._module)[self._hook] = self._own
