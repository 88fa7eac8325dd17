"""Finds out what a Trainer has, so that advice fits it."""

from __future__ import annotations

import re

import pytorch_lightning as pl
from torch import nn

from lightning_gradguard.core.detectors.diagnosis import Symptom
from lightning_gradguard.core.initialization import Finding
from lightning_gradguard.core.remedies import Present
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.other_clipping import clips_in_code, describe_other_clipper

_CALLBACKS: dict[Present, str] = {
    "clipping": "AdaptiveGradientClipping",
    "backoff": "LearningRateBackoff",
    "rollback": "NaNRollback",
    "check": "InitializationCheck",
    "treatment": "Treatment",
}
#: Loss over that of guessing from which on the last weights explain one that is stuck.
FAR_GUESS = 5.0
#: Classes with attention, whose layers are added to what they get, and others that do so.
_ATTENTION, _RESIDUAL = re.compile("Attention|Transformer"), re.compile("Resid|ResNet|BasicBlock|Bottleneck")


def present_in(trainer: pl.Trainer) -> set[Present]:
    """Returns what the Trainer and its module have that makes some advice pointless."""
    present = {
        name
        for name, known in _CALLBACKS.items()
        if any(is_instance_by_name(callback, known) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    }
    module = trainer.lightning_module
    if describe_other_clipper(trainer) or clips_in_code(module):
        present.add("clipping")
    if any(config.interval == "step" for config in trainer.lr_scheduler_configs):
        present.add("by_batch")
    layers = [*module.modules()]
    if not any(isinstance(layer, (nn.RNNBase, nn.RNNCellBase)) for layer in layers):
        present.add("feed_forward")
    # by name, as many are not torch's; a name that begins with _ is that of a parametrization
    names = [name for layer in layers if not (name := type(layer).__name__).startswith("_")]
    if any("Norm" in name for name in names):
        present.add("normalized")
    present.add("residual" if any(map(_ATTENTION.search, names)) else "no_attention")
    if any(map(_RESIDUAL.search, names)):
        present.add("residual")
    return present


def findings_of_check(trainer: pl.Trainer, symptom: Symptom) -> list[Finding]:
    """Returns what the check of the initialization has found of a symptom that the first weights explain."""
    # updates are small where gradients vanish
    is_stuck = symptom.kind == "stuck_loss" and symptom.cause in ("unknown", "learning_rate_too_low")
    is_stuck = is_stuck or symptom.cause == "large_logits"
    criterion = "gradient_gain" if symptom.tier == "depth" or is_stuck else symptom.kind
    sign = {"vanishing_gradient": -1, "exploding_gradient": 1}.get(symptom.kind, 0)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    checks = [callback for callback in callbacks if is_instance_by_name(callback, "InitializationCheck")]
    found = [f for check in checks for f in check.findings if symptom.is_of_initialization or is_stuck]
    fitting = [f for f in found if f.criterion == criterion and f.severity != "info" and f.value * sign >= 0]
    far = [f for f in found if f.criterion == "loss_over_guessing" and f.is_tried and f.value > FAR_GUESS]
    return fitting or [f for f in found if f.severity == "fail"] or (far if is_stuck else [])
