"""Findings about a first step: how losses are called, wrong dimensions, and the scale of targets."""

from __future__ import annotations

from torch import nn

from lightning_gradguard.core.detectors.diagnosis import Sample, of_first_losses
from lightning_gradguard.core.incidents import sentence_case
from lightning_gradguard.core.initialization import Finding
from lightning_gradguard.core.remedies import advice_for_symptom

#: Causes in the scale of the data, and those with which a network may train.
_OF_SCALE = ("target_scale", "data_scale")
_MAY_TRAIN = (
    *("softmax_before_loss", "labels_ignored", "softmax_over_batch", "inverted_mask", "view_for_transpose"),
    "dropout",
    *_OF_SCALE,
)


def findings_of_losses(sample: Sample, module: nn.Module) -> list[Finding]:
    """Returns what one step shows of its losses and dimensions, as findings with their advice."""
    # beside a side branch that is normalized to 0, the first layer gets a gradient
    passes = {"single_value"} if any(layer.gradient > 0 for layer in sample.layers[:1]) else set()
    return [
        Finding(
            symptom.cause,
            ", ".join(symptom.where[:1]),
            symptom.value,
            "about 1" if symptom.cause in _OF_SCALE else "0",
            "warn" if symptom.cause in _MAY_TRAIN or symptom.cause in passes else "fail",
            f"{sentence_case(symptom.evidence)}. {advice_for_symptom(symptom, (), module)}",
        )
        for symptom in of_first_losses(sample)
    ]
