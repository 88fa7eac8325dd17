"""Counts operations, host synchronizations and bytes of a piece of code. Nothing is timed.

Counts do not depend on the machine, so that a test can hold them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

State = TypeVar("State")

#: Operations with a result that the host needs: a number, or a shape that depends on values.
SYNCHRONIZING = frozenset(
    ["_unique", "_unique2", "argwhere", "bincount", "equal", "is_nonzero", "masked_select", "nonzero"]
    + ["unique_consecutive", "unique_dim"]
)
#: Operations that do not read the values of their first argument.
NOT_READING = frozenset(
    ["copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "full_like", "new_full", "new_ones"]
    + ["new_zeros", "ones_like", "zeros_like"]
)
#: Operations that start nothing on a device.
FREE = frozenset(
    ["_local_scalar_dense", "alias", "detach", "device", "empty", "empty_like", "empty_strided"]
    + ["lift_fresh", "new_empty", "new_empty_strided", "resize_", "set_"]
)
#: Prefixes of operations on lists of tensors.
ON_LISTS = ("_foreach_", "_fused_", "_amp_foreach_")
#: Limits of a launch of CUDA's kernels for lists: tensors and chunks of a launch, elements of a chunk.
TENSORS_PER_LAUNCH, CHUNKS_PER_LAUNCH, CHUNK = 110, 320, 65536
#: Tensors that one launch of `stack` or `cat` takes.
JOINED_PER_LAUNCH = 128


class Meter(TorchDispatchMode):
    """Counts what happens inside `with Meter() as meter:`, forward and backward.

    A CPU never synchronizes; what would synchronize with a GPU is counted there all the same: `item()`,
    `tolist()`, `cpu()`, and operations whose shape depends on values. Results of `cpu()` may be read
    freely as a whole. Code that bypasses the dispatcher, such as numpy's, is not counted.

    Attributes:
        ops: Calls of the dispatcher, without views and without those that only allocate.
        launches: Kernels that CUDA would start for them. This is a **model**: one for each operation, and
            for those on lists of tensors as many as their arguments need.
        waits: Synchronizations of the host with the device, by kind.
        late: Reads of copies that began before the meter did, which need no synchronization.
        d2h_async: Tensors copied to the host without blocking.
        read: Bytes of tensors that operations take.
        write: Bytes of tensors that operations make or change.
        names: Calls of each operation, views as well.

    Example:
        >>> tensors = [torch.ones(3), torch.ones(3)]
        >>> with Meter() as meter:
        ...     total = sum(tensor.norm().item() for tensor in tensors)
        >>> meter.ops, meter.syncs, meter.read
        (2, 2, 24)
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops = self.launches = self.late = self.d2h_async = self.read = self.write = 0
        self.waits: Counter[str] = Counter()
        self.names: Counter[str] = Counter()
        self.on_host = WeakIdKeyDictionary()
        self._python = _PythonCalls(self)
        self._made: set[int] = set()

    @property
    def syncs(self) -> int:
        """Number of host synchronizations."""
        return sum(self.waits.values())

    def row(self) -> dict[str, int]:
        """All numbers by name."""
        names = ("ops", "launches", "syncs", "late", "d2h_async", "read", "write")
        return {name: getattr(self, name) for name in names}

    def read_on_host(self, tensor: Tensor, kind: str) -> None:
        """Counts a read of a tensor's values by the host."""
        if isinstance(tensor, FakeTensor):
            self.waits[kind] += tensor.is_cuda
        elif tensor in self.on_host:
            pass
        elif _storage(tensor) in self._made:
            self.waits[kind] += 1
        else:
            self.late += 1

    def __enter__(self) -> Meter:
        self._python.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._python.__exit__(*exception)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            self.read_on_host(args[0], "item")
            if isinstance(args[0], FakeTensor):
                return _one(args[0])
        elif name in SYNCHRONIZING or _selects_by_mask(name, args):
            self.waits[name] += 1
        self._look_for_copies(name, args, kwargs)
        result = func(*args, **kwargs)
        self.names[name] += 1
        if not func.is_view:
            self._made.update(_storage(tensor) for tensor in _tensors(result))
            if name not in FREE:
                self._count(name, func._schema.arguments, args, kwargs, result)
        return result

    def _look_for_copies(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Between the host and a fake device."""
        if name == "_to_copy":
            pairs = [(torch.device(kwargs.get("device") or args[0].device).type, args[0].device.type)]
        elif name == "copy_":
            pairs = [(args[0].device.type, args[1].device.type)]
        elif name == "_foreach_copy_":
            pairs = [(to.device.type, source.device.type) for to, source in zip(*args[:2], strict=True)]
        else:
            return
        is_async = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        for to, source in pairs:
            if to == source:
                continue
            if not is_async:
                self.waits["copy to the host" if to == "cpu" else "copy to the device"] += 1
            elif to == "cpu":
                self.d2h_async += 1

    def _count(
        self,
        name: str,
        schema: Sequence[Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> None:
        self.ops += 1
        given = dict(zip((argument.name for argument in schema), args, strict=False)) | dict(kwargs)
        written = {a.name for a in schema if a.alias_info is not None and a.alias_info.is_write}
        seen: set[int] = set()
        for place, (argument, value) in enumerate(given.items()):
            for tensor in _tensors(value):
                if not (place == 0 and name in NOT_READING) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    self.read += tensor.nbytes
                if argument in written:
                    self.write += tensor.nbytes
                    self._made.add(_storage(tensor))
        if not written:
            self.write += sum(tensor.nbytes for tensor in _tensors(result))
        self.launches += _launches(name, [_tensors(value) for value in given.values()])


class _PythonCalls(TorchFunctionMode):
    """Sees what never reaches the dispatcher on a CPU, since nothing has to be moved there."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor):
            for tensor in _tensors(args[0] if args else kwargs["data"]):
                if func is torch.tensor or tensor is not args[0]:
                    self._meter.read_on_host(tensor, "torch.tensor")
        if not (args and isinstance(args[0], Tensor)):
            return func(*args, **kwargs)
        tensor, name = args[0], getattr(func, "__name__", "")
        if name == "tolist":
            self._meter.read_on_host(tensor, name)
        if isinstance(tensor, FakeTensor) or not _moves_to_host(name, args, kwargs):
            return func(*args, **kwargs)
        if kwargs.get("non_blocking"):
            self._meter.d2h_async += 1
        else:
            self._meter.read_on_host(tensor, "copy to the host")
        result = func(*args, **kwargs)
        # on a device this would be another tensor: reading it is free, reading the original is not
        result = result.view_as(result) if result is tensor else result
        self._meter.on_host[result] = True
        return result


@dataclass
class _FakeDevice:
    """Stands for a GPU with a single stream, as far as events are concerned.

    Args:
        meter: That which runs.
    """

    meter: Meter | None = None

    def record_event(self) -> _Event:
        """Records a position in the work of the device."""
        return _Event(self, self.meter)


@dataclass
class _Event:
    """A position that the host may synchronize with.

    Args:
        device: The device that recorded it.
        meter: That which ran then.
    """

    device: _FakeDevice
    meter: Meter | None

    def synchronize(self) -> None:
        """Counts a synchronization, late if the event was recorded before the meter began."""
        meter = self.device.meter
        if meter is None:
            return
        if self.meter is meter:
            meter.waits["event"] += 1
        else:
            meter.late += 1


def meter_on_cuda(build: Callable[[str], State], fn: Callable[[State], object]) -> Meter:
    """Meters `fn(build("cuda"))` on a simulated GPU.

    Tensors have a device and a shape and no values, so that copies to the host and synchronizations with
    events are counted as on a GPU; `item()` and `tolist()` give ones. A copy that `build` began,
    with an event, counts as late.

    Example:
        >>> meter_on_cuda(lambda device: torch.ones(3, device=device), torch.Tensor.cpu).waits
        Counter({'copy to the host': 1})
    """
    device = _FakeDevice()

    def tolist(tensor: FakeTensor) -> Any:
        if device.meter is not None:
            device.meter.read_on_host(tensor, "tolist")
        return _ones(tensor, tensor.shape)

    with (
        FakeTensorMode(),
        mock.patch("torch.cuda.current_stream", return_value=device),
        mock.patch.object(FakeTensor, "tolist", tolist),
    ):
        state = build("cuda")
        with Meter() as device.meter:
            fn(state)
    return device.meter


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    key: int = tensor.untyped_storage()._cdata
    return key


def _one(tensor: Tensor) -> float | int | bool:
    """In place of a value that is not there."""
    return 1.0 if tensor.is_floating_point() else tensor.dtype == torch.bool or 1


def _ones(tensor: Tensor, shape: Sequence[int]) -> Any:
    return [_ones(tensor, shape[1:]) for _ in range(shape[0])] if shape else _one(tensor)


def _selects_by_mask(name: str, args: Sequence[Any]) -> bool:
    """True if a mask is counted before it is used; a single number is filled in without."""
    if name not in ("index", "index_put_") or (name == "index_put_" and args[2].numel() == 1):
        return False
    return any(tensor.dtype == torch.bool for tensor in _tensors(args[1]))


def _moves_to_host(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if a call names the host; code for any device passes a `torch.device`."""
    return name == "cpu" or (
        name == "to" and "cpu" in [a for a in (*args[1:], *kwargs.values()) if isinstance(a, str)]
    )


def _launches(name: str, arguments: Sequence[Sequence[Tensor]]) -> int:
    longest = max(arguments, key=len, default=[])
    if name in ("stack", "cat"):
        return math.ceil(len(longest) / JOINED_PER_LAUNCH)
    if not name.startswith(ON_LISTS):
        return 1
    chunks = sum(math.ceil(tensor.numel() / CHUNK) for tensor in longest)
    launches = max(1, math.ceil(len(longest) / TENSORS_PER_LAUNCH), math.ceil(chunks / CHUNKS_PER_LAUNCH))
    # norms of chunks are put together by a second kernel
    is_norm = name in ("_foreach_norm", "_foreach_powsum", "_foreach_max")
    return launches + (1 + math.ceil(len(longest) / 512) if is_norm else 0)
