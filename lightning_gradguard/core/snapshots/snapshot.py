"""One copy of training state in memory, and its restoration in place."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.core.norms import local_shard
from lightning_gradguard.core.snapshots.buffers import copy_tensors, module_buffers
from lightning_gradguard.core.snapshots.nonfinite import LARGEST


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
        self.extra_state: Any = None
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
            for owner, name, buffer in module_buffers(module.modules()):
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
            for owner, name, buffer in module_buffers(module.modules()):
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
        copy_tensors(targets, sources)

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
            copy_tensors(targets, sources)
            return
        self._stream = self._stream or torch.cuda.Stream(on_gpu)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(on_gpu))
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(targets, sources, non_blocking=True)
        for source in sources:
            if source.is_cuda:
                source.record_stream(self._stream)


def _optimized(optimizers: Sequence[Optimizer]) -> set[Tensor]:
    return {p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_sparse
