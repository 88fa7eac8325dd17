"""Dossiers: folders with everything that is needed to reproduce an incident, and a page about it."""

from __future__ import annotations

import json
import os
import pickle
import platform
import shlex
import shutil
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_leaves_with_path

from lightning_gradguard.core.forensics import Origin
from lightning_gradguard.core.incidents import current_name, label
from lightning_gradguard.runtime.logging.console import relative_to_cwd
from lightning_gradguard.runtime.logging.html_page import Section, render_page

#: Raised whenever a file of an earlier version could no longer be read.
FORMAT = 1
_MEGABYTE = 1024 * 1024
#: Key that marks an array of NumPy in the file; the other key is its dtype.
_ARRAY = "lightning_gradguard.numpy"


class DossierError(Exception):
    """A dossier cannot be read, for the reason in the message."""


@dataclass(frozen=True)
class Dossier:
    """One incident.

    Args:
        origin: What was found out.
        step: `trainer.global_step` when it happened.
        epoch: `trainer.current_epoch` when it happened.
        batch_idx: The batch of that epoch.
        rank: The process that saw the batch.
        batch: Plain containers of tensors and arrays, on the CPU; `None` if it was omitted. Named
            tuples are tuples, mappings are dictionaries.
        rng: Random number generators before the step; see `core.snapshots.rng_state`.
        weights: `state_dict` of the module before the step; `None` if it was omitted.
        left_out: Omitted parts, with the reasons.
        precision: The Trainer's.
        loss_scale: The GradScaler's; 1 without one.
        largest: For tensors that are out of range: their largest magnitude in a healthy state.
        evaluating: Names of the submodules that were in evaluation mode.
        frozen: Names of the parameters that were not trained.
        configuration: Of module, optimizers and Trainer, as text.
        versions: Of what took part, by name.
        changes: Those that a `Treatment` has made of the module; see `runtime.treatment.module`.
    """

    origin: Origin
    step: int
    epoch: int
    batch_idx: int
    rank: int
    batch: Any
    rng: dict[str, Any]
    weights: dict[str, Tensor] | None
    left_out: tuple[str, ...] = ()
    precision: str = "32-true"
    loss_scale: float = 1.0
    largest: dict[str, float] = field(default_factory=dict)
    evaluating: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    configuration: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)


def write_dossier(folder: Path, dossier: Dossier, *, megabytes: float) -> Path:
    """Writes `dossier.pt`, `finding.json` and `index.html` into a folder of their own, which is returned.

    The folder is named after the step, and appears complete or not at all. Parts that are not plain data, or
    too large, are omitted and listed: weights first, then the batch.

    Raises:
        OSError: If it cannot be written.
    """
    dossier = _within(_plain(dossier), megabytes * _MEGABYTE)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial-{uuid.uuid4().hex}"
    partial.mkdir()
    try:
        content = {**vars(dossier), "origin": asdict(dossier.origin), "format": FORMAT}
        _save(content, partial / "dossier.pt")
        about = ("step", "epoch", "batch_idx", "rank", "left_out", "versions")
        finding = {**asdict(dossier.origin), **{name: getattr(dossier, name) for name in about}}
        (partial / "finding.json").write_text(json.dumps(finding, indent=2), encoding="utf-8")
        target = _free_name(folder, str(dossier.step))
        (partial / "index.html").write_text(_page(dossier, target), encoding="utf-8")
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def read_dossier(path: str | Path) -> Dossier:
    """Reads a dossier; nothing in it is run as code.

    Raises:
        DossierError: If there is none, it is torn, of another version, or holds more than plain data.
    """
    file = Path(path)
    file = file / "dossier.pt" if file.is_dir() else file
    try:
        opened = file.open("rb")
    except FileNotFoundError:
        raise DossierError(f"there is no dossier in {path}.") from None
    except OSError as error:
        raise DossierError(f"{file} cannot be opened: {error.strerror or error}.") from None
    try:
        with opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what else a file that is no dossier has in it
            content = torch.load(opened, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DossierError(
            f"{file} is not a dossier, or holds more than plain data; it was not loaded, for loading it "
            "could run code."
        ) from None
    except Exception as error:  # a torn archive makes torch raise many kinds
        raise DossierError(f"{file} is damaged or no dossier: {type(error).__name__}.") from None
    found = content.pop("format", None) if isinstance(content, dict) else None
    if found != FORMAT:
        raise DossierError(
            f"{file} has format {found!r}; this version of lightning_gradguard reads format {FORMAT}. "
            "Install the version that wrote it (see finding.json)."
        )
    try:
        origin = Origin(**content["origin"])
        content["origin"] = replace(origin, cause=current_name(origin.cause))
        content["batch"] = _from_plain(content["batch"])
        content["rng"] = _from_plain(content["rng"])
        return Dossier(**content)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise DossierError(f"{file} lacks what a dossier holds: {error}.") from None


def versions() -> dict[str, str]:
    """Returns those of Python, torch, Lightning and this package, and the device's name."""
    return {
        "lightning_gradguard": metadata.version("lightning-gradguard"),
        "pytorch_lightning": metadata.version("pytorch_lightning"),
        "torch": str(torch.__version__),  # it is of a class of its own, which no dossier may hold
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
    }


def _save(content: dict[str, Any], path: Path) -> None:
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # of a full disk torch raises an error of its own, with that of the system as context
        context = error.__context__
        raise (context if isinstance(context, OSError) else OSError(str(error))) from None


def _plain(dossier: Dossier) -> Dossier:
    left_out = list(dossier.left_out)
    try:
        batch = _plain_data(dossier.batch)
    except (TypeError, ValueError) as error:
        batch = None
        left_out.append(f"the batch: {error}")
    weights = dossier.weights
    if weights is not None:
        # extra state can be anything, and quantized weights are of classes of their own
        odd = [name for name, weight in weights.items() if not _is_plain_tensor(weight)]
        left_out += [
            f"{name} among the weights: {type(weights[name]).__name__} is not plain data" for name in odd
        ]
        weights = {
            name: w.detach().cpu().as_subclass(Tensor) for name, w in weights.items() if name not in odd
        }
    changed = {"batch": batch, "weights": weights, "rng": _plain_data(dossier.rng)}
    return replace(dossier, **changed, left_out=tuple(left_out))


def _plain_data(value: Any) -> Any:
    """Returns the data without classes that reading would have to import: as those of their base classes."""
    if _is_plain_tensor(value):
        return value.detach().as_subclass(Tensor).cpu().clone()
    if isinstance(value, np.ndarray):
        native = value.astype(value.dtype.newbyteorder("="))
        return {_ARRAY: torch.from_numpy(native), "dtype": native.dtype.str}
    if isinstance(value, Mapping):
        return {_plain_data(k): _plain_data(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain_data(v) for v in value)
    if isinstance(value, list):
        return [_plain_data(v) for v in value]
    if isinstance(value, Enum):
        return _plain_data(value.value)
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return _plain_data(value.item())
    if value is None or isinstance(value, bool):
        return value
    kind: Any = next((k for k in (int, float, str, bytes) if isinstance(value, k)), None)
    if kind is not None:
        return kind(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


def _is_plain_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) and not is_traceable_wrapper_subclass(value)


def _from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        if _ARRAY in value:
            return value[_ARRAY].numpy().astype(value["dtype"])
        return {k: _from_plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_from_plain(v) for v in value)
    return value


def _within(dossier: Dossier, limit: float) -> Dossier:
    """Returns the dossier without what does not fit."""
    left_out = list(dossier.left_out)
    kept: dict[str, Any] = {}
    remaining = limit
    for part in ("batch", "weights"):
        size = _bytes(getattr(dossier, part))
        if size <= remaining:
            remaining -= size
        else:
            kept[part] = None
            left_out.append(
                f"the {part}: {size / _MEGABYTE:.3g} MB do not fit into what is left of "
                f"{limit / _MEGABYTE:g} MB"
            )
    return replace(dossier, **kept, left_out=tuple(left_out))


def _bytes(value: Any) -> int:
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _free_name(folder: Path, name: str) -> Path:
    candidates = (folder / (name if i == 1 else f"{name}-{i}") for i in range(1, 10**6))
    return next(path for path in candidates if not path.exists())


def _page(dossier: Dossier, folder: Path) -> str:
    origin = dossier.origin
    facts = {
        "cause": label(origin.cause),
        "module": origin.module,
        "operation": origin.operation,
        "line": origin.location,
        "code": origin.code,
        "at fault": ", ".join(origin.where[:10]),
        "inputs": "" if origin.low is None else f"{origin.low:.6g} to {origin.high:.6g} ({origin.dtype})",
        "when": f"step {dossier.step}, epoch {dossier.epoch}, batch {dossier.batch_idx}, rank {dossier.rank}",
        "precision": dossier.precision,
        "omitted": "; ".join(dossier.left_out),
    }
    sections = [
        Section("Incident", origin.detail, facts),
        Section("Next steps", origin.remedy()),
        Section("Batch", rows={} if dossier.batch is None else dict(_describe(dossier.batch))),
        Section(
            "Reproduce",
            "Run this command where the module can be imported:",
            command=f"lightning-gradguard replay {shlex.quote(relative_to_cwd(folder))} "
            + model_options(dossier.configuration),
        ),
        Section("Configuration", rows=dossier.configuration),
        Section("Versions", rows=dossier.versions),
    ]
    return render_page(f"Step {dossier.step}: {label(origin.cause)}", sections)


def model_options(configuration: Mapping[str, str]) -> str:
    """Returns the options with which the command line builds the module of a run.

    Example:
        >>> model_options({"module": "my.Net", "hparams.width": "5", "hparams._class_path": "my.Net"})
        '--model my.Net --model.width 5'
    """
    arguments = [
        f" --model.{name.removeprefix('hparams.')} {shlex.quote(value)}"
        for name, value in configuration.items()
        if name.startswith("hparams.") and not name.startswith("hparams._")  # those of LightningCLI
    ]
    return f"--model {configuration.get('module', 'your.package.Module')}" + "".join(arguments)


def _describe(batch: Any) -> list[tuple[str, str]]:
    rows = []
    for path, leaf in tree_leaves_with_path(_from_plain(batch)):
        name = "batch" + "".join(map(str, path))
        leaf = torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf
        if not isinstance(leaf, Tensor):
            rows.append((name, repr(leaf)[:100]))
            continue
        text = f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
        with suppress(RuntimeError):  # torch cannot compare values of every dtype and layout
            text += _range(leaf)
        rows.append((name, text))
    return rows


def _range(tensor: Tensor) -> str:
    if tensor.is_complex():
        return ""
    finite = tensor[torch.isfinite(tensor)] if tensor.is_floating_point() else tensor
    missing = tensor.numel() - finite.numel()
    low_high = f", {float(finite.min()):.4g} to {float(finite.max()):.4g}" if finite.numel() else ""
    return low_high + (f", {missing} nonfinite" if missing else "")
