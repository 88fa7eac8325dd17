"""Hooks of the module on the gradients of a step; a skipped one has none."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytorch_lightning as pl

from lightning_gradguard.runtime import lightning_api


def hooks_on_gradients(pl_module: pl.LightningModule) -> list[str]:
    """Returns the names of the module's own hooks that Lightning calls on the gradients of a step."""
    names = ["on_before_optimizer_step"]
    names += ["configure_gradient_clipping"] if pl_module.automatic_optimization else []
    return [name for name in names if lightning_api.overrides(pl_module, name)]


def suppress_errors_of_hooks(pl_module: pl.LightningModule) -> None:
    """Has the hooks on the running step's gradients raise nothing: many cannot do without gradients."""
    for name in hooks_on_gradients(pl_module):
        _suppress_errors_once(pl_module, name)


def _suppress_errors_once(pl_module: pl.LightningModule, name: str) -> None:
    hook, attributes = getattr(pl_module, name), vars(pl_module)
    before = attributes.get(name)

    def once(*args: Any, **options: Any) -> None:
        if before is None:
            attributes.pop(name, None)
        else:
            attributes[name] = before
        with suppress(Exception):
            hook(*args, **options)

    attributes[name] = once
