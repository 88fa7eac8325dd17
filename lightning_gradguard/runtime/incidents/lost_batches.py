"""The log of lost batches, and the recognition of one that a resumed run sees again."""

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

#: Keys under which a batch may name its samples.
IDS = ("id", "ids", "idx", "index", "indices", "sample_id", "sample_ids", "uid", "key", "__key__")
#: Elements of a tensor in a fingerprint.
RECOGNIZED_BY = 4096
#: Elements of a batch that are kept until its fingerprint is needed, which it rarely is.
KEPT_NUMEL = 2048
#: Batches that can still be logged as lost.
REMEMBERED = 20_000
#: Tensors of a batch in its fingerprint: the first may be a mask that is always the same.
TENSORS = 4

Reason = Literal["skipped", "followed", "undone"]


@dataclass(slots=True)
class _Seen:
    step: int
    epoch: int
    batch_idx: int
    fingerprint: Tensor | list[Tensor]
    samples: Any
    is_lost: bool = False


@dataclass(frozen=True)
class LostBatch:
    """A batch whose update is not in the weights.

    Args:
        epoch: In which it was seen.
        batch_idx: Its place in the epoch.
        reason: `"skipped"`: its step was bad and did not take place; `"followed"`: the step before was bad,
            which was found when this one was about to be made; `"undone"`: training rolled back behind it.
        step: `trainer.global_step` when it was seen.
        samples: Its samples, if the batch names them.
        fingerprint: A number that distinguishes it from other batches.
    """

    epoch: int
    batch_idx: int
    reason: Reason
    step: int
    samples: list[Any] = field(default_factory=list)
    fingerprint: float | None = None


class LostBatches:
    """The lost batches of one process, logged to `lost_batches.rank<r>.jsonl` in the run's folder.

    Those of the runs that this one resumes, in the `earlier` folders, are recognized.
    """

    def __init__(self, folder: Path | None, rank: int, earlier: Sequence[str] = ()) -> None:
        self._name = f"lost_batches.rank{rank}.jsonl"
        self._folder = folder
        self._seen: deque[_Seen] = deque(maxlen=REMEMBERED)
        self._folders = list(earlier)
        self._earlier: dict[tuple[int, int], LostBatch] = {}
        for other in earlier:
            self._earlier.update(_read(Path(other) / self._name))

    def folders(self) -> list[str]:
        """Folders in which a run that resumes this one finds logs; empty if there is none."""
        own = [] if self._folder is None else [str(self._folder.absolute())]
        return list(dict.fromkeys([*self._folders, *own]))

    def earlier(self) -> dict[tuple[int, int], Reason]:
        """Returns epoch and index of the batches that earlier runs had lost, and the reasons."""
        return {place: lost.reason for place, lost in self._earlier.items()}

    def record(self, step: int, epoch: int, batch_idx: int, batch: Any) -> list[Tensor]:
        """Records a batch that is about to be trained on; returns its tensors."""
        tensors = tensors_of(batch)
        samples = [] if isinstance(batch, (Tensor, tuple, list)) else _samples(batch)
        self._seen.append(_Seen(step, epoch, batch_idx, _fingerprint(tensors), samples))
        return tensors

    def repeats_lost_batch(self) -> bool:
        """True if the last batch is one that earlier runs had lost."""
        seen = self._seen[-1]
        lost = self._earlier.get((seen.epoch, seen.batch_idx))
        if lost is None or lost.fingerprint is None:
            return False
        fingerprint = _number(seen.fingerprint)
        return fingerprint is not None and math.isclose(lost.fingerprint, fingerprint, rel_tol=1e-9)

    def mark_skipped(self, n: int, n_following: int = 0) -> None:
        """Logs the last batches: `n` that were skipped, and then those that followed them."""
        last = list(self._seen)[-n - n_following :] if n + n_following else []
        self._log(last[:n], "skipped")
        self._log(last[n:], "followed")

    def mark_undone(self, step: int) -> None:
        """Logs the batches seen since `step`, to which training rolled back."""
        self._log([s for s in self._seen if s.step >= step], "undone")

    def forget_before(self, step: int) -> None:
        """Forgets batches from before `step`, to which no rollback leads any more."""
        while self._seen and self._seen[0].step < step:
            self._seen.popleft()

    def _log(self, batches: list[_Seen], reason: Reason) -> None:
        """Writes those that are not written yet."""
        lines = []
        for seen in batches:
            if seen.is_lost:
                continue
            seen.is_lost = True
            samples, fingerprint = _as_list(seen.samples), _number(seen.fingerprint)
            lost = LostBatch(seen.epoch, seen.batch_idx, reason, seen.step, samples, fingerprint)
            lines.append(json.dumps(asdict(lost)) + "\n")
        if self._folder is None or not lines:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / self._name).open("a+b") as file:
                file.seek(max(file.seek(0, 2) - 1, 0))
                if file.read(1) not in (b"", b"\n"):
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


def tensors_of(batch: Any) -> list[Tensor]:
    """Returns the tensors in a batch, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, (tuple, list)) and {*map(type, batch)} <= {Tensor}:
        return list(batch)
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _fingerprint(tensors: Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Samples the first tensors of a batch, without a host synchronization.

    Returns:
        Copies of elements that are spread over all samples, from which `_number` computes the fingerprint
        of a lost batch; the fingerprint itself, of shape `()`, if there are more than `KEPT_NUMEL`.
    """
    spread: list[Tensor] = []
    kept = 0
    for tensor in tensors:
        is_dense = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_complex()
        if len(spread) < TENSORS and is_dense and (numel := tensor.numel()):
            values = tensor.detach()
            if (stride := numel // RECOGNIZED_BY) > 1:
                values = values.reshape(-1)[::stride]
                numel = values.numel()
            spread.append(values)
            kept += numel
    return _reduce(spread) if kept > KEPT_NUMEL else list(map(Tensor.clone, spread))


def _number(fingerprint: Tensor | list[Tensor]) -> float | None:
    if isinstance(fingerprint, list):
        return float(_reduce(fingerprint)) if fingerprint else None
    return float(fingerprint)


def _reduce(spread: list[Tensor]) -> Tensor:
    """Sums values weighted by position: the same samples in another order are another batch."""
    device = spread[0].device
    values = torch.cat([values.to(device, torch.float64).flatten() for values in spread])
    return torch.dot(values.nan_to_num(1.0, 2.0, -2.0), _places(tuple(map(Tensor.numel, spread)), device))


@lru_cache(maxsize=16)
def _places(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Weights by position: 1 to 2 over the first tensor, 2 to 3 over the next."""
    ramps = [
        torch.linspace(place, place + 1, length, dtype=torch.float64, device=device)
        for place, length in enumerate(lengths, 1)
    ]
    return torch.cat(ramps)


def _samples(batch: Any) -> Any:
    """Identities of the samples, if the batch is a mapping that has them."""
    if not isinstance(batch, Mapping):
        return []
    found: Any = next((batch[k] for k in IDS if k in batch), [])
    if isinstance(found, Tensor):
        # a copy: memory that a worker process shares keeps a file open
        return found.detach().clone() if found.ndim == 1 and not found.is_floating_point() else []
    is_plain = isinstance(found, (list, tuple)) and all(isinstance(one, (int, str)) for one in found)
    return list(found) if is_plain else []


def sample_ids(batch: Any) -> list[Any]:
    """Identities of a batch's samples, one a row, if it is a mapping that has them.

    Example:
        >>> sample_ids({"ids": torch.tensor([7, 9]), "x": torch.zeros(2, 3)})
        [7, 9]
    """
    return _as_list(_samples(batch))


def _as_list(samples: Any) -> list[Any]:
    return samples.tolist() if isinstance(samples, Tensor) else samples
