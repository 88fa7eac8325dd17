"""The ledger of lost batches: which they were, and whether one is served again."""

from __future__ import annotations

import json
import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

#: Keys under which a batch may say which samples it holds.
IDS = ("id", "ids", "idx", "index", "indices", "sample_id", "sample_ids", "uid", "key", "__key__")
#: Elements of a tensor that a batch is recognized by.
RECOGNIZED_BY = 4096
#: Batches that can still be written down as lost.
REMEMBERED = 20_000
#: Tensors of a batch that it is recognized by: the first may be a mask that is always the same.
TENSORS = 4

Reason = Literal["skipped", "followed", "undone"]


@dataclass
class _Served:
    step: int
    epoch: int
    batch_idx: int
    fingerprint: Tensor | None
    samples: Any
    is_lost: bool = False


@dataclass(frozen=True)
class LostBatch:
    """A batch that has left nothing in the weights.

    Args:
        epoch: When it was served.
        batch_idx: Its place in the epoch.
        reason: `"skipped"`: its step was sick, and did not take place; `"followed"`: the step before was,
            which was seen when this one was about to be made; `"undone"`: training went back behind it.
        step: `trainer.global_step` when it was served.
        samples: Which samples it held, if the batch says so.
        fingerprint: A number that tells it from other batches.
    """

    epoch: int
    batch_idx: int
    reason: Reason
    step: int
    samples: list[Any] = field(default_factory=list)
    fingerprint: float | None = None


class LostBatches:
    """Keeps the ledger of one process, in a file `lost_batches.rank<r>.jsonl` of the run's folder.

    Args:
        folder: Of the file; `None` writes none.
        rank: Of this process.
        earlier: Folders of the runs that are resumed, whose lost batches are recognized.
    """

    def __init__(self, folder: Path | None, rank: int, earlier: Sequence[str] = ()) -> None:
        self._name = f"lost_batches.rank{rank}.jsonl"
        self._folder = folder
        self._served: deque[_Served] = deque(maxlen=REMEMBERED)
        self._folders = list(earlier)
        self._earlier: dict[tuple[int, int], LostBatch] = {}
        for other in earlier:
            self._earlier.update(_read(Path(other) / self._name))

    def folders(self) -> list[str]:
        """Where a run that is resumed from this one finds ledgers; empty if this one has none."""
        own = [] if self._folder is None else [str(self._folder.absolute())]
        return list(dict.fromkeys([*self._folders, *own]))

    def earlier(self) -> dict[tuple[int, int], Reason]:
        """Epoch and index of the batches that the resumed runs had lost, and why."""
        return {place: lost.reason for place, lost in self._earlier.items()}

    def serve(self, step: int, epoch: int, batch_idx: int, batch: Any) -> None:
        """Take note of a batch that is about to be trained on."""
        self._served.append(_Served(step, epoch, batch_idx, _fingerprint(batch), _samples(batch)))

    def was_lost_before(self) -> bool:
        """Whether the batch served last is one that the resumed runs had lost."""
        served = self._served[-1]
        lost = self._earlier.get((served.epoch, served.batch_idx))
        if lost is None or lost.fingerprint is None or served.fingerprint is None:
            return False
        return math.isclose(lost.fingerprint, float(served.fingerprint), rel_tol=1e-9)

    def lose_last(self, n: int, followed: int = 0) -> None:
        """The last batches are lost: `n` that were skipped, and then those that followed them."""
        last = list(self._served)[-n - followed :] if n + followed else []
        self._lose(last[:n], "skipped")
        self._lose(last[n:], "followed")

    def lose_since(self, step: int) -> None:
        """Training went back to `step`: what was served since is undone."""
        self._lose([s for s in self._served if s.step >= step], "undone")

    def forget_before(self, step: int) -> None:
        """Training will not go back further than to `step`."""
        while self._served and self._served[0].step < step:
            self._served.popleft()

    def _lose(self, batches: list[_Served], reason: Reason) -> None:
        """Write down those that are not yet."""
        lines = []
        for served in batches:
            if served.is_lost:
                continue
            served.is_lost = True
            fingerprint = None if served.fingerprint is None else float(served.fingerprint)
            samples = _as_list(served.samples)
            lost = LostBatch(served.epoch, served.batch_idx, reason, served.step, samples, fingerprint)
            lines.append(json.dumps(asdict(lost)) + "\n")
        if self._folder is None or not lines:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / self._name).open("a+b") as file:
                if file.tell() and file.seek(-1, 2) and file.read(1) != b"\n":
                    lines.insert(0, "\n")  # a killed process has left half a line
                file.write("".join(lines).encode())
        except OSError as error:
            warnings.warn(f"lost batches are no longer written to a file: {error}", stacklevel=2)
            self._folder = None


def _read(path: Path) -> dict[tuple[int, int], LostBatch]:
    found: dict[tuple[int, int], LostBatch] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            lost = LostBatch(**json.loads(line))
            fingerprint = None if lost.fingerprint is None else float(lost.fingerprint)
            found[int(lost.epoch), int(lost.batch_idx)] = replace(lost, fingerprint=fingerprint)
        except (ValueError, TypeError):
            continue  # a line of another version, or one that a killed process left unfinished
    return found


def _fingerprint(batch: Any) -> Tensor | None:
    """A number that changes with any of the first tensors of the batch; nobody has waited for it."""
    if isinstance(batch, Tensor):
        parts = [batch]
    else:
        parts = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    leaves = [leaf for leaf in parts if isinstance(leaf, Tensor) and _is_dense(leaf)][:TENSORS]
    if not leaves:
        return None
    # spread over all samples, and weighted by their places: others in another order are another batch
    device = leaves[0].device
    seen = [leaf.detach().reshape(-1) for leaf in leaves]
    seen = [values[:: max(values.numel() // RECOGNIZED_BY, 1)] for values in seen]
    wide = [values.to(device, torch.float64) for values in seen]
    values = torch.cat(wide) if len(wide) > 1 else wide[0]
    return torch.dot(values.nan_to_num(1.0, 2.0, -2.0), _places(tuple(map(Tensor.numel, seen)), device))


@lru_cache(maxsize=16)
def _places(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """From 1 to 2 over the first tensor, from 2 to 3 over the next."""
    ramps = [
        torch.linspace(place, place + 1, length, dtype=torch.float64, device=device)
        for place, length in enumerate(lengths, 1)
    ]
    return torch.cat(ramps)


def _is_dense(tensor: Tensor) -> bool:
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_complex()
        and tensor.numel() > 0
    )


def _samples(batch: Any) -> Any:
    """The samples' identities, where the batch is a mapping that has them."""
    found: Any = next((batch[k] for k in IDS if k in batch), []) if isinstance(batch, Mapping) else []
    if isinstance(found, Tensor):
        # a copy: memory that a worker process shares keeps a file open
        return found.detach().clone() if found.ndim == 1 and not found.is_floating_point() else []
    return list(found) if isinstance(found, (list, tuple)) and _are_plain(found) else []


def sample_ids(batch: Any) -> list[Any]:
    """The samples of a batch, one for each of its rows, where it is a mapping that says so.

    Example:
        >>> samples_of({"ids": torch.tensor([7, 9]), "x": torch.zeros(2, 3)})
        [7, 9]
    """
    return _as_list(_samples(batch))


def _as_list(samples: Any) -> list[Any]:
    return samples.tolist() if isinstance(samples, Tensor) else samples


def _are_plain(values: Any) -> bool:
    return all(isinstance(value, (int, str)) for value in values)
