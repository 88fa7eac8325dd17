"""Copies of training state in memory, and putting them back in place."""

from __future__ import annotations

import copy
import random
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_gradguard.core.norms import largest_magnitudes, together
from lightning_gradguard.core.sharding import local_shard


def rng_state() -> dict[str, Any]:
    """The state of every random number generator that training draws from.

    A GPU's generators are left out while nobody uses it: to ask for them would set up CUDA, and processes
    that are forked later could not use it.
    """
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` returned.

    Example:
        >>> state = rng_state()
        >>> first = torch.rand(2)
        >>> set_rng_state(state)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])


#: Elements up to which a buffer is copied at every step. The version counter tells whether a larger one was
#: written; for small ones it is not trusted: torch writes the running statistics of batch normalization
#: without counting.
SMALL = 65_536
#: A larger magnitude is as good as infinite: a sum of a few squares overflows float32. A flipped exponent
#: bit makes one of almost any weight.
LARGEST = 1e17


@dataclass
class _Copy:
    buffer: Tensor
    version: int
    saved: Tensor

    @property
    def may_have_changed(self) -> bool:
        return self.buffer.numel() <= SMALL or self.buffer._version != self.version


class BufferCopies:
    """Copies of a module's buffers, and of frozen weights that somebody writes, as those of a target network.

    Buffers that are left out of `state_dict` are among them. Large ones, such as masks and tables of
    positions, cost nothing while nobody writes them, and frozen weights cost nothing until somebody has; the
    first time is seen too late to be undone.

    Args:
        module: The module whose buffers, submodules included, are kept.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> copies = BufferCopies(norm)
        >>> _ = norm(torch.full((4, 2), torch.nan))
        >>> copies.restore()
        >>> norm.running_mean
        tensor([0., 0.])
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._copies: dict[tuple[nn.Module, str], _Copy] = {}
        self._frozen: dict[nn.Parameter, int] = {}
        self._written: dict[nn.Parameter, _Copy] = {}
        self.look_again()
        self.refresh()

    def look_again(self) -> None:
        """Find the submodules: there may be others by now."""
        self._owners = list(self._module.modules())

    @torch.no_grad()
    def refresh(self, *, within_step: bool = False) -> None:
        """Copy the buffers as they are now.

        Args:
            within_step: Whether weights may want no gradient only because another optimizer has its turn.
        """
        old, self._copies = self._copies, {}
        targets, sources = [], []
        for weight, copy_ in self._written.items():
            targets.append(copy_.saved)
            sources.append(local_shard(weight))
        for weight in (w for owner in self._owners for w in owner._parameters.values() if w is not None):
            if not (weight.requires_grad or within_step or weight in self._written):
                before = self._frozen.get(weight, weight._version)
                self._frozen[weight] = weight._version
                if weight._version != before:
                    self._written[weight] = _Copy(weight, 0, local_shard(weight).clone())
        for owner, name, buffer in _buffers(self._owners):
            known = old.get((owner, name))
            if known is None or known.buffer is not buffer or known.saved.shape != buffer.shape:
                known = _Copy(buffer, buffer._version, local_shard(buffer).clone())
            elif known.may_have_changed:
                targets.append(known.saved)
                sources.append(local_shard(buffer))
                known.version = buffer._version
            self._copies[owner, name] = known
        _copy(targets, sources)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the buffers back, in place, as the last `refresh` found them.

        A graph through normalization can still go backward, as that of a generator whose critic's step was
        skipped.
        """
        targets, sources = [], []
        for (owner, name), copy_ in self._copies.items():
            owner._buffers[name] = copy_.buffer  # a forward pass may have put another tensor there, or none
            if copy_.may_have_changed:
                target = local_shard(copy_.buffer)
                # unseen by autograd: a graph holds running statistics, but does not use them to go backward
                targets.append(target.data if isinstance(owner, _NormBase) else target)
                sources.append(copy_.saved)
        for weight, copy_ in self._written.items():
            targets.append(local_shard(weight))
            sources.append(copy_.saved)
        _copy(targets, sources)
        for copy_ in self._copies.values():
            copy_.version = copy_.buffer._version

    def saved(self) -> dict[Any, Tensor]:
        """The copies: of buffers by owner and name, of frozen weights by themselves."""
        buffers = {place: copy_.saved for place, copy_ in self._copies.items()}
        return {**buffers, **{weight: copy_.saved for weight, copy_ in self._written.items()}}

    def written(self) -> Collection[nn.Parameter]:
        """Frozen weights that somebody has written."""
        return self._written.keys()


class Snapshot:
    """One copy of weights, buffers and optimizer state; memory is taken once and written in place.

    Hyperparameters of the optimizers (learning rates among them) are not part of it: they belong to the
    schedule.

    From a GPU, `"cpu"` is pinned memory that a stream of its own writes while training goes on; `wait` must
    come before weights are written again.

    Args:
        device: `"cpu"` keeps the copy in host memory, `"same"` beside each tensor.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._memory: dict[Any, Tensor] = {}
        self._structure: list[dict[Tensor, dict[Any, Any]]] = []
        self._has_stepped_state = True
        self.companions: Any = None
        self.good_steps = 0

    @torch.no_grad()
    def capture(
        self,
        modules: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        written: Collection[nn.Parameter] = (),
        copied: Mapping[Any, Tensor] | None = None,
        *,
        stepped: bool = True,
    ) -> None:
        """Copy the state of modules and optimizers as it is now.

        Args:
            modules: The trained module first, then averages of it and the like.
            optimizers: Their state is copied; it may still be empty.
            written: Frozen weights that are copied as well.
            copied: Take buffers and frozen weights from here, as `BufferCopies.saved` returns them, where a
                forward pass has written them, or does before the copy is made.
            stepped: Whether what the optimizers write is copied; otherwise, of the trained module, only what
                is in `copied` is, and `restore` leaves the rest as it is.
        """
        copied = copied or {}
        live: dict[Any, Tensor] = {}
        kept = {*_optimized(optimizers), *written}
        if not stepped:
            live, modules, optimizers = dict(copied), modules[1:], ()
        for module in modules:
            for weight in module.parameters():
                # while one optimizer is toggled on, what the others train wants no gradient
                if weight.requires_grad or weight in kept:
                    live[weight] = copied.get(weight, weight)
            for owner, name, buffer in _buffers(module.modules()):
                live[(owner, name)] = copied.get((owner, name), buffer)
        self._structure = []
        self._has_stepped_state = stepped
        for index, optimizer in enumerate(optimizers):
            structure: dict[Tensor, dict[Any, Any]] = {}
            for parameter, state in optimizer.state.items():
                structure[parameter] = {
                    key: None if _is_plain(value) else copy.deepcopy(value) for key, value in state.items()
                }
                for key, value in state.items():
                    if _is_plain(value):
                        live[(index, parameter, key)] = value
            self._structure.append(structure)
        self._write(live)
        self.good_steps = 0

    @torch.no_grad()
    def restore(self, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Put everything back in place; optimizer state born after the capture is removed."""
        self.wait()
        targets: list[Tensor] = []
        sources: list[Tensor] = []

        def put_back(key: Any, live: Tensor) -> None:
            if (saved := self._memory.get(key)) is not None and saved.shape == local_shard(live).shape:
                targets.append(local_shard(live))
                sources.append(saved)

        for module in modules:
            for weight in module.parameters():
                put_back(weight, weight)
            for owner, name, buffer in _buffers(module.modules()):
                saved = self._memory.get((owner, name))
                if saved is not None and saved.shape != local_shard(buffer).shape:
                    owner._buffers[name] = saved.to(buffer.device, copy=True)  # it has grown since
                put_back((owner, name), buffer)
        for index, optimizer in enumerate(optimizers if self._has_stepped_state else ()):
            structure = self._structure[index] if index < len(self._structure) else {}
            for parameter in list(optimizer.state):
                if parameter not in structure:
                    del optimizer.state[parameter]
            for parameter, saved_state in structure.items():
                state = optimizer.state[parameter]
                for key in list(state):
                    if key not in saved_state:
                        del state[key]
                for key, value in saved_state.items():
                    saved = self._memory.get((index, parameter, key))
                    if value is not None or saved is None:
                        state[key] = copy.deepcopy(value)
                    elif not isinstance(state.get(key), Tensor):
                        state[key] = saved.to(parameter.device, copy=True)
                    else:
                        put_back((index, parameter, key), state[key])
        _copy(targets, sources)

    def wait(self) -> None:
        """Let the device write weights only after they have been copied. The host does not wait."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def compare(
        self, named: Iterable[tuple[str, Tensor]], optimizers: Sequence[Optimizer]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Weights and optimizer state, each with its name, as it is and as it was at the capture.

        Optimizer state grows by nature: as it was, it is taken to have been a tenth of what only corruption
        goes beyond.
        """
        if self._stream is not None:
            self._stream.synchronize()  # what is yielded may be read on the host
        names = {}
        for name, parameter in named:
            names[parameter] = name
            if (saved := self._memory.get(parameter)) is not None:
                yield name, parameter, saved
        bound = torch.tensor(LARGEST**2 / 10)
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if _is_plain(value):
                        yield f"{key} of {names.get(parameter, 'a parameter')}", value, bound

    def n_bytes(self) -> int:
        """Memory that the copy takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._memory.values())

    def _write(self, live: dict[Any, Tensor]) -> None:
        for key in self._memory.keys() - live.keys():
            del self._memory[key]
        targets, sources = [], []
        for key, tensor in live.items():
            source = local_shard(tensor)
            target = self._memory.get(key)
            if target is None or target.shape != source.shape or target.dtype != source.dtype:
                device = source.device if self._device == "same" else torch.device("cpu")
                pinned = source.is_cuda and device.type == "cpu"
                target = self._memory[key] = torch.empty_like(source, device=device, pin_memory=pinned)
            targets.append(target)
            sources.append(source.detach())
        self._copy_out(targets, sources)

    def _copy_out(self, targets: list[Tensor], sources: list[Tensor]) -> None:
        on_gpu = next((s.device for s in sources if s.is_cuda), None)
        if self._device == "same" or on_gpu is None:
            _copy(targets, sources)
            return
        self._stream = self._stream or torch.cuda.Stream(on_gpu)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(on_gpu))
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(targets, sources, non_blocking=True)
        for source in sources:
            if source.is_cuda:
                source.record_stream(self._stream)


class SnapshotRing:
    """The last proven snapshots, and one that still has to prove itself.

    A snapshot is *qualified* when enough good steps followed it. Memory is recycled: at most `keep + 1`
    snapshots exist.

    Args:
        keep: Qualified snapshots that are kept.
        good_steps: Good steps after which a pending snapshot is qualified.
        device: See `Snapshot`.
    """

    def __init__(self, keep: int, good_steps: int = 10, device: str = "cpu") -> None:
        self._keep = keep
        self._good_steps = good_steps
        self._device = device
        self._qualified: deque[Snapshot] = deque()
        self._free: list[Snapshot] = []
        self._pending: Snapshot | None = None
        self._newest_was_tried = False

    @property
    def is_pending(self) -> bool:
        """Whether a snapshot waits for its good steps."""
        return self._pending is not None

    def pending(self) -> Snapshot | None:
        """The snapshot that waits for its good steps."""
        return self._pending

    def capture(self, fill: Callable[[Snapshot], None], *, qualified: bool = False) -> None:
        """Take a new pending snapshot (or one that counts as proven at once).

        Args:
            fill: Writes the state into the snapshot that it is given.
            qualified: Proven by definition, as the state at the first training batch is.
        """
        self.discard_pending()
        snapshot = self._free.pop() if self._free else Snapshot(self._device)
        fill(snapshot)
        if qualified:
            self._promote(snapshot)
        else:
            self._pending = snapshot

    def good_step(self) -> None:
        """Count a good step; the pending snapshot is qualified by the last one that it needs."""
        if self._pending is None:
            return
        self._pending.good_steps += 1
        if self._pending.good_steps >= self._good_steps:
            self._promote(self._pending)
            self._pending = None

    def wait(self) -> None:
        """See `Snapshot.wait`; of the one captured last."""
        for snapshot in (self._pending, *self._qualified):
            if snapshot is not None:
                snapshot.wait()

    def discard_pending(self) -> None:
        """Drop the snapshot that has not proven itself."""
        if self._pending is not None:
            self._free.append(self._pending)
            self._pending = None

    def clear(self) -> None:
        """Forget every snapshot; their memory is kept for the next ones."""
        self.discard_pending()
        self._free.extend(self._qualified)
        self._qualified.clear()
        self._newest_was_tried = False

    def __len__(self) -> int:
        """Number of qualified snapshots."""
        return len(self._qualified)

    def go_back(self) -> Snapshot:
        """The snapshot to restore: the newest qualified, or the one before if that was tried already."""
        self.discard_pending()
        if self._newest_was_tried and len(self._qualified) > 1:
            self._free.append(self._qualified.pop())
        self._newest_was_tried = True
        return self._qualified[-1]

    def oldest(self) -> Snapshot:
        """The oldest snapshot that training may go back to."""
        return self._qualified[0]

    def newest(self) -> Snapshot:
        """The newest qualified snapshot, without counting as tried."""
        return self._qualified[-1]

    def _promote(self, snapshot: Snapshot) -> None:
        self._qualified.append(snapshot)
        self._newest_was_tried = False
        while len(self._qualified) > self._keep:
            self._free.append(self._qualified.popleft())


@torch.no_grad()
def any_nonfinite(tensors: Iterable[Tensor], squares: Iterable[Tensor] = ()) -> Tensor:
    """Whether any element is nonfinite, or as good as; a flag of shape `()` that nobody has waited for.

    It is on the device if any of the tensors is.

    Args:
        tensors: Those that are looked at; integers never are.
        squares: More of them, whose elements may be squares.

    Example:
        >>> any_nonfinite([torch.ones(2), torch.tensor([1.0, torch.inf])])
        tensor(True)
    """
    groups: dict[tuple[torch.device, torch.dtype, float], list[Tensor]] = defaultdict(list)
    for some, largest in ((tensors, LARGEST), (squares, LARGEST**2)):
        for tensor in some:
            local = local_shard(tensor)
            local = torch.view_as_real(local) if local.is_complex() else local
            if local.is_floating_point() and local.numel():
                groups[local.device, local.dtype, largest].append(local)
    device = next((device for device, *_ in groups if device.type != "cpu"), torch.device("cpu"))
    found = torch.zeros((), dtype=torch.bool, device=device)
    for (_, dtype, largest), group in groups.items():
        # a bound that the type cannot hold would become infinity, and let infinity pass
        bound = min(largest, torch.finfo(dtype).max)
        # the largest magnitude of each is nonfinite if any element is
        flag = (~(largest_magnitudes(together(group)) <= bound)).any()
        # one that is on the host goes along as a number, where a copy to the device would be waited for
        found = found | (flag if flag.device.type == "cpu" else flag.to(device))
    return found


def _optimized(optimizers: Sequence[Optimizer]) -> set[Tensor]:
    return {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _buffers(owners: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in owners:
        for name, buffer in owner._buffers.items():
            if buffer is not None and not is_lazy(buffer):
                yield owner, name, buffer


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_sparse


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if not targets:
        return
    groups: dict[Any, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        group = groups[target.device, target.dtype, source.device, source.dtype]
        group[0].append(target)
        group[1].append(source)
    # of different kinds in one list, torch would copy each by itself
    for alike in groups.values():
        torch._foreach_copy_(*alike)
