"""Weights from a file, and into a module; and what to say if they do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gradguard.cli.errors import UsageError, one_line


def read_checkpoint(
    path: str, option: str, *, weights_only: bool = True, trust: str | None = None
) -> dict[str, Any]:
    """What is in a checkpoint of Lightning's, or in a file with a `state_dict` alone.

    Args:
        path: Of the file.
        option: Where it was named; for messages.
        weights_only: See `torch.load`; anything else runs code that is in the file.
        trust: What to type to have `weights_only` off, if that can be typed; for messages.

    Returns:
        With `state_dict` in it.

    Raises:
        RefusalError: If it cannot be read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be opened: {error.strerror}.") from None
    except Exception:  # torch raises many kinds
        if not weights_only or not (classes := _classes_in(path)):
            raise UsageError(f"{option} {path} is damaged, or was not written by torch.save.") from None
        remedy = f"If you trust the file, add {trust}." if trust else "Save its state_dict alone."
        raise UsageError(f"{option} {path} holds {classes[0]}, which is no plain data. {remedy}") from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(weight, Tensor) for weight in weights.values()):
        raise UsageError(f"{option} {path} holds no weights by their names.")
    return content if "state_dict" in content else {"state_dict": {**content}}


def _classes_in(path: str) -> list[str]:
    """Names of the classes that reading a file would import; nothing is run."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # torch raises many kinds here, too, and says nothing of files of its older format
        return []


def load_weights(module: pl.LightningModule, weights: Mapping[str, Any]) -> None:
    """Give a module its weights.

    Args:
        module: Of the same class as that which had them.
        weights: By their names.

    Raises:
        RefusalError: If one is missing, is too many or of another shape.
    """
    own = module.state_dict()
    try:
        keys = module.load_state_dict(weights, strict=False)
        # extra state is of any kind, and not kept
        missing = [name for name in keys.missing_keys if not name.endswith("_extra_state")]
        problems = [f"{name} is missing in them" for name in missing]
        problems += [f"the module has no {name}" for name in keys.unexpected_keys]
    except RuntimeError as error:
        shapes = ((n, w.shape, own[n].shape) for n, w in weights.items() if n in own)
        problems = [f"{n} is {tuple(w)}, the module's {tuple(o)}" for n, w, o in shapes if w != o]
        problems = problems or [one_line(str(error))]
    if problems:
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UsageError(
            f"the weights do not fit {type(module).__name__}: {problems[0]}{more}. Give the arguments that "
            "the run's module was built with, as --model.NAME VALUE or --config."
        )
