"""The guards that are compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from lightning_gradguard import AdaptiveGradientClipping, ClippingPolicy, ZScoreClipping, default_callbacks


@dataclass(frozen=True)
class Guard:
    """What a run has beside the program.

    Args:
        title: For tables.
        callbacks: Makes them.
        clip: `gradient_clip_val` of the Trainer.
    """

    title: str
    callbacks: Callable[[], list[pl.Callback]] = list
    clip: float | None = None


def suite(policy: ClippingPolicy | None = None) -> list[pl.Callback]:
    """Returns the suite by defaults, but for the clipping policy."""
    return default_callbacks(adaptive_gradient_clipping=AdaptiveGradientClipping(policy))


GUARDS: dict[str, Guard] = {
    "none": Guard("no guard"),
    "clip 0.1": Guard("`gradient_clip_val` .1", clip=0.1),
    "clip 1": Guard("`gradient_clip_val` 1", clip=1.0),
    "clip 10": Guard("`gradient_clip_val` 10", clip=10.0),
    "zclip": Guard(
        "ZClip: `ZScoreClipping()`, no cap", lambda: [AdaptiveGradientClipping(ZScoreClipping(max_norm=None))]
    ),
    "zclip cap 1": Guard(
        "suite with `ZScoreClipping(max_norm=1)`, the default of 0.5",
        lambda: suite(ZScoreClipping(max_norm=1.0)),
    ),
    "policy": Guard("`AdaptiveGradientClipping()` alone", lambda: [AdaptiveGradientClipping()]),
    "suite": Guard("the suite by defaults", suite),
}


def clipping_of(callbacks: list[Any]) -> AdaptiveGradientClipping | None:
    """Returns the clipping callback, if there is one."""
    return next((c for c in callbacks if isinstance(c, AdaptiveGradientClipping)), None)
