"""The indices of a batch's samples in a map-style data set, as the batch sampler gives them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Subset

from lightning_gradguard.runtime import lightning_api


def behind_subsets(loader: Any, index: int) -> int:
    """Returns the index in the data set that a `Subset`, as `random_split` makes it, is of."""
    dataset = getattr(loader, "dataset", None)
    while type(dataset) is Subset:
        index, dataset = int(dataset.indices[index]), dataset.dataset
    return index


class DatasetIndices:
    """Records the indices that a data loader's batch sampler yields, in the order of its batches.

    A recorder takes the place of the batch sampler while a fit runs, and passes everything on. The first
    epoch of a loader with workers has asked for batches before; these have no indices.
    """

    def __init__(self, trainer: pl.Trainer) -> None:
        self._served: deque[list[int]] = deque()
        self._unknown = 0
        self._loader: DataLoader[Any] | None = None
        self._iterator: Any = None
        loader = trainer.train_dataloader
        # a subclass may draw its batches otherwise
        if type(loader) is DataLoader and loader.batch_sampler is not None:
            self._loader = loader
            self._sampler = loader.batch_sampler
            recorder = _Recorder(loader.batch_sampler, self)
            # the attribute itself cannot be set once a loader is made
            vars(loader)["batch_sampler"] = recorder
            self._record_running(lightning_api.train_iterator(trainer), recorder)

    def _record_running(self, iterator: Any, recorder: _Recorder) -> None:
        """Records the iterator of the first epoch, which exists before any callback is asked."""
        self._unknown = getattr(iterator, "_send_idx", 0)
        if hasattr(iterator, "_sampler_iter"):
            iterator._sampler_iter = self.recorded(iterator._sampler_iter)
            # persistent workers begin each epoch with the sampler of their iterator
            iterator._index_sampler, self._iterator = recorder, iterator

    def recorded(self, indices: Iterator[list[int]]) -> Iterator[list[int]]:
        """Yields the same indices, and keeps those of batches that are not served yet."""
        for batch in indices:
            self._served.append(batch)
            yield batch

    def begin_epoch(self) -> None:
        """Forgets batches of an epoch that ended early."""
        self._served.clear()
        self._unknown = 0

    def next_batch(self) -> list[int]:
        """Returns the indices of the batch that is served now; empty if they are unknown."""
        if self._unknown:
            self._unknown -= 1
            return []
        indices = self._served.popleft() if self._served else []
        return indices if isinstance(indices, list) and set(map(type, indices)) <= {int} else []

    def restore(self) -> None:
        """Puts the batch sampler back."""
        if self._loader is not None:
            vars(self._loader)["batch_sampler"] = self._sampler
        if self._iterator is not None:
            self._iterator._index_sampler = self._sampler


class _Recorder:
    """A batch sampler that yields what the wrapped one does."""

    def __init__(self, sampler: Any, owner: DatasetIndices) -> None:
        self._wrapped = sampler
        self._owner = owner

    def __getattr__(self, name: str) -> Any:
        if name == "_wrapped":  # while a copy is made
            raise AttributeError(name)
        return getattr(self._wrapped, name)

    def __len__(self) -> int:
        return len(self._wrapped)

    def __iter__(self) -> Iterator[list[int]]:
        self._owner.begin_epoch()
        return self._owner.recorded(iter(self._wrapped))
