"""Reads weights from a file, and loads them into a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gradguard.cli.messages import UsageError, one_line


def read_checkpoint(
    path: str, option: str, *, weights_only: bool = True, trust: str | None = None
) -> dict[str, Any]:
    """Reads a checkpoint of Lightning's, or a file with a `state_dict` alone; returns one with that key.

    Without `weights_only`, code in the file is run. Messages name `option`, which gave the path, and `trust`,
    the flag that turns `weights_only` off, if there is one.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=weights_only)
    except OSError as error:
        raise UsageError(f"{option} {path} cannot be opened: {error.strerror}.") from None
    except Exception:  # torch raises exceptions of many classes
        if not weights_only or not (classes := _classes_in(path)):
            raise UsageError(f"{option} {path} is damaged, or was not written by torch.save.") from None
        remedy = f"If you trust the file, add {trust}." if trust else "Save its state_dict alone."
        raise UsageError(f"{option} {path} holds {classes[0]}, which is no plain data. {remedy}") from None
    weights = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not any(isinstance(weight, Tensor) for weight in weights.values()):
        raise UsageError(f"{option} {path} holds no weights by their names.")
    return content if "state_dict" in content else {"state_dict": {**content}}


def _classes_in(path: str) -> list[str]:
    """Returns the names of the classes that reading a file would import; runs nothing."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # of many classes here, too; torch does not support files of its older format
        return []


def load_weights(module: pl.LightningModule, weights: Mapping[str, Any]) -> None:
    """Loads weights into a module; a `UsageError` names those that do not fit."""
    own = module.state_dict()
    try:
        keys = module.load_state_dict(weights, strict=False)
        # a dossier has no extra state
        missing = [name for name in keys.missing_keys if not name.endswith("_extra_state")]
        problems = [f"{name} is missing in them" for name in missing]
        problems += [f"the module has no {name}" for name in keys.unexpected_keys]
    except RuntimeError as error:
        shapes = ((n, w.shape, own[n].shape) for n, w in weights.items() if n in own)
        problems = [f"{n} is {tuple(w)} there, {tuple(o)} in the module" for n, w, o in shapes if w != o]
        problems = problems or [one_line(str(error))]
    if problems:
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise UsageError(
            f"the weights do not fit {type(module).__name__}: {problems[0]}{more}. Give the arguments that "
            "the run's module was built with, as --model.NAME VALUE or --config."
        )
