"""Steps that raise because of their values: recognition, and skipping of their batches."""

from __future__ import annotations

import re
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gradguard.core.forensics import rejection
from lightning_gradguard.runtime.training_step import TrainingStep, replace_step

#: Errors with which checks of values end, in torch (`torch.distributions`, indices, linear algebra) and in
#: the user's code.
_CHECKS = (ValueError, AssertionError, IndexError, ArithmeticError)
_MESSAGES = re.compile("out of bounds|out of range|linalg|nonfinite|non-finite")


def is_check_of_values(error: BaseException) -> bool:
    """Checks that an exception comes from a check of values, as far as its type and message show.

    Example:
        >>> is_check_of_values(ValueError("Expected parameter loc")), is_check_of_values(TypeError("x"))
        (True, False)
    """
    is_runtime = isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None
    return isinstance(error, _CHECKS) or is_runtime or rejection(error) is not None


def was_raised_in_step(error: BaseException) -> bool:
    """Checks that an exception came through a `training_step`."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_name == "training_step":
            return True
        traceback = traceback.tb_next
    return False


def skip_invalid_batches(pl_module: pl.LightningModule) -> TrainingStep:
    """Lets a step that raises on its values return a NaN loss; returns what `restore_step` takes."""

    def skipping(step: TrainingStep) -> TrainingStep:
        def training_step(*args: Any, **kwargs: Any) -> Any:
            try:
                return step(*args, **kwargs)
            except Exception as error:
                if not is_check_of_values(error):
                    raise
                return _nan_loss(pl_module)

        return training_step

    return replace_step(pl_module, skipping)


def _nan_loss(pl_module: pl.LightningModule) -> Tensor:
    # of all parameters, for which strategies wait
    trained = [p.sum() for p in pl_module.parameters() if p.requires_grad]
    return torch.stack([total.float() for total in trained]).sum() * float("nan")
