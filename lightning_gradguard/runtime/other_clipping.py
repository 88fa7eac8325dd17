"""Clipping by the Trainer or the module, after that of the suite."""

from __future__ import annotations

import pytorch_lightning as pl

from lightning_gradguard.runtime import lightning_api


def clip_norm(trainer: pl.Trainer) -> float | None:
    """Returns the norm to which the Trainer itself clips; `None` if it does not, or clips otherwise."""
    by_value = trainer.gradient_clip_algorithm == "value"
    if (
        not trainer.gradient_clip_val
        or by_value
        or lightning_api.overrides(trainer.lightning_module, "configure_gradient_clipping")
    ):
        return None
    return float(trainer.gradient_clip_val)


def describe_other_clipper(trainer: pl.Trainer) -> str:
    """Returns the clipping that follows that of the suite, in words; empty if there is none."""
    if trainer.gradient_clip_val:
        how = " by value" if clip_norm(trainer) is None else ""
        return f"gradient_clip_val={trainer.gradient_clip_val:g}{how} of the Trainer"
    if lightning_api.overrides(trainer.lightning_module, "configure_gradient_clipping"):
        return f"{type(trainer.lightning_module).__name__}.configure_gradient_clipping"
    return ""
