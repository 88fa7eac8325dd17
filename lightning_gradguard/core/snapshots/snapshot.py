"""One copy of training state in memory, and its restoration in place."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from lightning_gradguard.core.norms import default_norm, local_shard
from lightning_gradguard.core.snapshots.buffers import copy_tensors, module_buffers
from lightning_gradguard.core.snapshots.nonfinite import MAX_MAGNITUDE

#: Least norm of weights, relative to torch's default initialization, that is a unit of distance.
SMALL_START = 0.03


class Snapshot:
    """One copy of weights, buffers and optimizer state, whose memory is allocated once.

    Hyperparameters of the optimizers, such as learning rates, belong to the schedule and are not copied.

    From a GPU, `"cpu"` is pinned memory that a separate stream writes while training continues: call `wait`
    before weights are written again.

    Args:
        device: `"cpu"` keeps the copy in host memory, `"same"` on the device of each tensor.

    Attributes:
        extra_state: Anything else of the same moment, for the caller.
        good_steps: Number of good steps since the capture.
        losses: Those of them, or the first that is known.
        is_trusted: True if the loss was not worse than at the trusted one before.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._memory: dict[Any, Tensor] = {}
        #: For each optimizer its state by parameter, with `None` in place of dense tensors.
        self._structure: list[dict[Tensor, dict[Any, Any]]] = []
        self._has_stepped_state = True
        self.extra_state: Any = None
        self.good_steps = 0
        self.losses: list[float] = []
        self.is_trusted = True

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
        """Copies the current state of modules and optimizers.

        Args:
            modules: The trained module first, then others, such as its averages.
            optimizers: Optimizers whose state is copied; it may still be empty.
            written: Frozen weights that are copied as well.
            copied: Buffers and frozen weights by `BufferCopies.saved`, which are taken in place of the live
                ones that a forward pass writes before the copy is made.
            stepped: True to copy what the optimizers write; otherwise only `copied` is copied of the trained
                module, and `restore` leaves the rest unchanged.
        """
        copied = copied or {}
        live: dict[Any, Tensor] = {}
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        kept = {*written, *(parameter for group in groups for parameter in group["params"])}
        if not stepped:
            live, modules, optimizers = dict(copied), modules[1:], ()
        for key, tensor in _live_tensors(modules, optimizers):
            # while one optimizer is toggled on, weights of the others require no gradient
            if not isinstance(key, Tensor) or key.requires_grad or key in kept:
                live[key] = copied.get(key, tensor)
        self._structure = [
            {
                parameter: {k: None if _is_plain(v) else copy.deepcopy(v) for k, v in state.items()}
                for parameter, state in optimizer.state.items()
            }
            for optimizer in optimizers
        ]
        self._has_stepped_state = stepped
        self._write(live)
        self.good_steps = 0
        self.losses = []
        self.is_trusted = True

    @torch.no_grad()
    def restore(self, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Restores everything in place; optimizer state that was added after the capture is removed."""
        self.wait()
        optimizers = optimizers if self._has_stepped_state else ()
        self._restore_structure(modules, optimizers)
        pairs = []
        for key, tensor in _live_tensors(modules, optimizers):
            target = local_shard(tensor)
            if (saved := self._memory.get(key)) is not None and saved.shape == target.shape:
                pairs.append((target, saved))
        copy_tensors(pairs)

    def _restore_structure(self, modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Restores the shapes of buffers and the entries of optimizer states."""
        for owner, name, buffer in module_buffers(owner for module in modules for owner in module.modules()):
            saved = self._memory.get((owner, name))
            if saved is not None and saved.shape != local_shard(buffer).shape:
                owner._buffers[name] = saved.to(buffer.device, copy=True)
        for index, optimizer in enumerate(optimizers):
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

    def wait(self) -> None:
        """Orders later writes of weights on the device after the copy, without a host synchronization."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def compare(
        self, named: Iterable[tuple[str, Tensor]], optimizers: Sequence[Optimizer]
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yields the name, the current value and the captured value of weights and optimizer state.

        Optimizer state grows in healthy training: a tenth of the magnitude that only corruption exceeds takes
        the place of its captured value.
        """
        if self._stream is not None:
            self._stream.synchronize()  # what is yielded may be read on the host
        names = {}
        for name, parameter in named:
            names[parameter] = name
            if (saved := self._memory.get(parameter)) is not None:
                yield name, parameter, saved
        bound = torch.tensor(MAX_MAGNITUDE**2 / 10)
        for optimizer in optimizers:
            for parameter, state in optimizer.state.items():
                for key, value in state.items():
                    if _is_plain(value):
                        yield f"{key} of {names.get(parameter, 'a parameter')}", value, bound

    @torch.no_grad()
    def distance(self, optimizers: Sequence[Optimizer]) -> float:
        """Returns how far the trained weights are from the copy, in units of its norm. Synchronizes.

        The norm counts as at least a small share of that of torch's default initialization: weights that
        start near 0 have no scale of their own. Weights that have not moved, or of which there is no copy,
        are at distance 0. Of sharded weights only the shards of this rank are looked at.
        """
        if self._stream is not None:
            self._stream.synchronize()
        moved = norm = 0.0
        copied: list[Tensor] = []
        for optimizer in optimizers:
            for weight in (weight for group in optimizer.param_groups for weight in group["params"]):
                saved = self._memory.get(weight)
                now = local_shard(weight)
                if saved is not None and saved.shape == now.shape:
                    there = saved.to(now.device).double()
                    moved += float((now.double() - there).square().sum())
                    norm += float(there.square().sum())
                    copied.append(there)
        if moved == 0.0:
            return 0.0
        unit = max(math.sqrt(norm), SMALL_START * default_norm(copied))
        return math.sqrt(moved) / unit if unit > 0 else math.inf

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
        on_gpu = next((source.device for source in sources if source.is_cuda), None)
        if self._device == "same" or on_gpu is None:
            copy_tensors(zip(targets, sources, strict=True))
            return
        self._stream = self._stream or torch.cuda.Stream(on_gpu)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(on_gpu))
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(targets, sources, non_blocking=True)
        for source in sources:
            if source.is_cuda:
                source.record_stream(self._stream)


def _live_tensors(
    modules: Sequence[nn.Module], optimizers: Sequence[Optimizer]
) -> Iterator[tuple[Any, Tensor]]:
    """Yields materialized weights and buffers, and dense optimizer states, each with the key of its copy."""
    for module in modules:
        for weight in module.parameters():
            if not is_lazy(weight):
                yield weight, weight
        for owner, name, buffer in module_buffers(module.modules()):
            yield (owner, name), buffer
    for index, optimizer in enumerate(optimizers):
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if _is_plain(value):
                    yield (index, parameter, key), value


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_sparse
