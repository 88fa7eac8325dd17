"""The guards that are compared."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl

from benchmarks.evidence.rivals import SkipStep, spike_detection
from lightning_gradguard import (
    AdaptiveGradientClipping,
    ClippingPolicy,
    PercentileClipping,
    PerTensorClipping,
    UnitwiseClipping,
    ZScoreClipping,
    default_callbacks,
)


@dataclass(frozen=True)
class Guard:
    """What a run has beside the program.

    Args:
        title: For tables.
        callbacks: Makes them.
        clip: `gradient_clip_val` of the Trainer.
        is_automatic: True if it works under automatic optimization only.
    """

    title: str
    callbacks: Callable[[], list[pl.Callback]] = list
    clip: float | None = None
    is_automatic: bool = False


def suite(policy: ClippingPolicy | None = None) -> list[pl.Callback]:
    """Returns the suite by defaults, but for the clipping policy."""
    return default_callbacks(adaptive_gradient_clipping=AdaptiveGradientClipping(policy))


def alone(policy: ClippingPolicy | None = None) -> Callable[[], list[pl.Callback]]:
    """Returns a maker of a clipping policy without the rest of the suite."""
    return lambda: [AdaptiveGradientClipping(copy.deepcopy(policy))]


#: Rules as published are those of `lightning_gradguard` with the constants of their authors, alone.
GUARDS: dict[str, Guard] = {
    "none": Guard("no guard"),
    "clip 0.1": Guard("`gradient_clip_val` .1", clip=0.1),
    "clip 1": Guard("`gradient_clip_val` 1", clip=1.0),
    "clip 10": Guard("`gradient_clip_val` 10", clip=10.0),
    "zclip": Guard("ZClip, no cap", alone(ZScoreClipping(max_norm=None))),
    "zclip published": Guard("ZClip, cap 1", alone(ZScoreClipping())),
    "autoclip": Guard("AutoClip, 10th percentile", alone(PercentileClipping())),
    "agc": Guard("AGC .01", alone(UnitwiseClipping())),
    "adagc": Guard("AdaGC", alone(PerTensorClipping())),
    "skipstep": Guard("SkipStep", lambda: [SkipStep()]),
    "spike detection": Guard("`SpikeDetection`", spike_detection, is_automatic=True),
    "zclip cap 1": Guard(
        "suite with `ZScoreClipping(max_norm=1)`, the default of 0.5",
        lambda: suite(ZScoreClipping(max_norm=1.0)),
    ),
    "policy": Guard("`AdaptiveGradientClipping()` alone", alone()),
    "suite": Guard("the suite by defaults", suite),
}


def clipping_of(callbacks: list[Any]) -> AdaptiveGradientClipping | None:
    """Returns the clipping callback, if there is one."""
    return next((c for c in callbacks if isinstance(c, AdaptiveGradientClipping)), None)
