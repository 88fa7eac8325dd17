"""Records the batches on which all trials train, and those that are held out."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.combined_loader import CombinedLoader
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves

from lightning_gradguard.runtime.lightning_api import Callback

#: Bytes of all recorded batches, and batches that are held out at most.
MAX_BYTES, MAX_HELD_OUT = 512 * 2**20, 12
#: Share of an epoch that is held out where there are no validation data.
HELD_OUT_SHARE = 0.15


class Batches:
    """Serves recorded epochs one after the other, and then from the first again; each batch as a copy."""

    def __init__(self, epochs: Sequence[Sequence[Any]]) -> None:
        self._epochs = epochs
        self._next = 0

    def __len__(self) -> int:
        return len(self._epochs[0])

    def __iter__(self) -> Iterator[Any]:
        epoch = self._epochs[self._next % len(self._epochs)]
        for i, batch in enumerate(epoch):
            # an epoch that was begun and not ended, to look at its first batch, is served again
            self._next += i == len(epoch) - 1
            yield copy.deepcopy(batch)


@dataclass(frozen=True)
class RecordedBatches:
    """The batches of all trials.

    Args:
        epochs: Batches of training, by epoch.
        validation: Batches of each validation loader.
        held_out: Batches on which the held-out loss is measured.
        source: The kind of these, in words.
        fingerprint: Hash of the first batches.
        notes: Limits that a reader should know.
    """

    epochs: Sequence[Sequence[Any]]
    validation: Sequence[Sequence[Any]]
    held_out: Sequence[Any]
    source: str
    fingerprint: str
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> str:
        """The number that trials are compared by."""
        n = len(self.held_out)
        return f"loss of training_step on {n} {self.source} batch{'es' if n != 1 else ''}"


@dataclass(eq=False)
class Recorder(Callback):
    """Ends a fit as soon as its loaders are there, and records their batches.

    Args:
        wanted: Batches of training that are needed.
        deadline: When recording ends with fewer, on the clock of `time.monotonic`.
    """

    wanted: int
    deadline: float
    epochs: list[list[Any]] = field(default_factory=list)
    validation: list[list[Any]] = field(default_factory=list)
    unserved: list[Any] = field(default_factory=list)
    steps: float = 0.0
    is_repeatable: bool = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reads the loaders."""
        self.steps = trainer.estimated_stepping_batches
        loaders = trainer.val_dataloaders
        for loader in loaders if isinstance(loaders, list) else [] if loaders is None else [loaders]:
            self.validation.append([batch for batch, _ in zip(loader, range(MAX_HELD_OUT), strict=False)])
        if not self.validation:
            self.unserved = _validation_of(trainer, pl_module)
        left, is_whole = MAX_BYTES, True
        while is_whole and len(self.epochs) * len(self.epochs[0] if self.epochs else []) < self.wanted:
            torch.manual_seed(len(self.epochs))
            epoch: list[Any] = []
            for batch, *_ in CombinedLoader(trainer.train_dataloader, "max_size_cycle"):
                epoch.append(batch)
                left -= sum(t.numel() * t.element_size() for t in tree_leaves(batch) if isinstance(t, Tensor))
                recorded = sum(map(len, self.epochs)) + len(epoch)
                if recorded >= self.wanted or left < 0 or time.monotonic() > self.deadline:
                    is_whole = len(epoch) >= trainer.num_training_batches
                    break
            if not epoch or (self.epochs and len(epoch) != len(self.epochs[0])):
                break
            self.epochs.append(epoch)
            if left < 0 or time.monotonic() > self.deadline:
                break
        if self.epochs and self.epochs[0]:
            torch.manual_seed(0)
            again = next(iter(CombinedLoader(trainer.train_dataloader, "max_size_cycle")))[0]
            self.is_repeatable = fingerprint([again]) == fingerprint(self.epochs[0][:1])
        raise Recorded

    def result(self) -> RecordedBatches:
        """Returns the batches, with some held out."""
        first = self.epochs[0]
        notes = []
        if not self.is_repeatable:
            notes.append(
                "The data give other batches each time; those of the first pass were recorded, and serve "
                "all trials."
            )
        known = [*self.validation, self.unserved]
        fitting = [loader for loader in known if loader and _is_like(loader[0], first[0])]
        if fitting:
            epochs, held_out, source = self.epochs, fitting[0], "validation"
        elif len(first) > 1:
            n = min(max(round(HELD_OUT_SHARE * len(first)), 1), MAX_HELD_OUT)
            epochs, held_out = [first[:-n]], first[-n:]
            source = "held-out training"
            why = "no validation batch is like a training batch" if any(known) else "no validation data"
            notes.append(f"There are {why}: {n} of {len(first)} batches of training are held out.")
        else:
            epochs, held_out, source = self.epochs, first, "training"
            notes.append("One batch was recorded and no validation data: its own loss is measured.")
        return RecordedBatches(
            epochs, self.validation, held_out, source, fingerprint([*first[:2], *held_out[:1]]), tuple(notes)
        )


def _validation_of(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Any]:
    """Returns validation batches that the program has and, without a `validation_step`, does not use."""
    owner = getattr(trainer, "datamodule", None) or pl_module
    try:
        loader = owner.val_dataloader()
        return [batch for batch, _ in zip(loader, range(MAX_HELD_OUT), strict=False)]
    except Exception:  # none, or several loaders
        return []


class Recorded(Exception):
    """Ends a fit, as all batches are recorded."""


def fingerprint(batches: Sequence[Any]) -> str:
    """Returns a hash of the tensors of batches.

    Example:
        >>> fingerprint([torch.ones(2)]) == fingerprint([torch.ones(2)])
        True
    """
    found = hashlib.sha256()
    for leaf in tree_leaves(list(batches)):
        if isinstance(leaf, Tensor):
            found.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _is_like(one: Any, other: Any) -> bool:
    """True if two batches have the same structure, but for the number of samples."""
    leaves, structure = tree_flatten(one)
    others, expected = tree_flatten(other)
    return structure == expected and all(
        (a.dtype, a.shape[1:]) == (b.dtype, b.shape[1:])
        for a, b in zip(leaves, others, strict=True)
        if isinstance(a, Tensor) and isinstance(b, Tensor)
    )
