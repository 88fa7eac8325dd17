"""Steps that raise because of their values: recognition, and skipping of their batches."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gradguard.core.forensics import rejection

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


def skip_invalid_batches(pl_module: pl.LightningModule) -> None:
    """Lets a step that raises on its values return a NaN loss, so that it is skipped like any other NaN."""
    step = pl_module.training_step

    @functools.wraps(step)
    def training_step(*args: Any, **kwargs: Any) -> Any:
        try:
            return step(*args, **kwargs)
        except Exception as error:
            if not is_check_of_values(error):
                raise
            return _nan_loss(pl_module)

    training_step.before = step  # type: ignore[attr-defined]
    pl_module.training_step = training_step  # type: ignore[method-assign]


def raise_on_invalid_batches(pl_module: pl.LightningModule) -> None:
    """Undoes `skip_invalid_batches`."""
    if hasattr(pl_module.training_step, "before"):
        del pl_module.training_step


def original_step(pl_module: pl.LightningModule) -> Callable[..., Any]:
    """Returns the module's own `training_step`, which raises."""
    step: Callable[..., Any] = getattr(pl_module.training_step, "before", pl_module.training_step)
    return step


def _nan_loss(pl_module: pl.LightningModule) -> Tensor:
    # of all parameters, for which strategies wait
    trained = [p.sum() for p in pl_module.parameters() if p.requires_grad]
    return torch.stack([total.float() for total in trained]).sum() * float("nan")
