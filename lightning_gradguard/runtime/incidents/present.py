"""Finds out what a Trainer has, so that advice does not name it."""

from __future__ import annotations

import pytorch_lightning as pl
from torch import nn

from lightning_gradguard.core.remedies import Present
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.other_clipping import clips_in_code, describe_other_clipper

_CALLBACKS: dict[Present, str] = {
    "clipping": "AdaptiveGradientClipping",
    "backoff": "LearningRateBackoff",
    "rollback": "NaNRollback",
    "check": "InitializationCheck",
}


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
    if not any(isinstance(module, (nn.RNNBase, nn.RNNCellBase)) for module in module.modules()):
        present.add("feed_forward")
    return present
