"""A GPU that is not there: tensors on the host that say they are on `cuda:0`, and who waits for them.

Real numbers are computed, on the CPU, so that a real `Trainer.fit` trains and decides as ever. Torch's
`FakeTensorMode` has devices without hardware too, but no numbers; and in a build without CUDA it has no
backward pass on them. To torch's own C++ code the tensors are on the CPU: what it does differently on a GPU
is not seen here, and is left to the tests on one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_gradguard

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
PACKAGE = Path(lightning_gradguard.__file__).parent
#: Operations that give a number to the host, or a tensor of a size that the host has to be told.
READS = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
#: The same, where `torch.tensor` asks a tensor for them, of which no mode hears.
NUMBERS = {
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__format__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.item,
}

Kind = Literal["wait", "late wait", "send"]


@dataclass(frozen=True)
class Sight:
    """Something that the host and the device do together.

    Args:
        kind: `"wait"` if the host waits for what the device was asked for in this batch; `"late wait"` if it
            waits for an earlier batch only; `"send"` if numbers travel to it and it goes on.
        what: In a few words.
        where: The line, of the package if it has a part in it.
        is_own: Whether the package has.
        batch: The batch that was running.
        aside: Whether a stream other than that of training was asked.
    """

    kind: Kind
    what: str
    where: str
    is_own: bool
    batch: int
    aside: bool

    def __str__(self) -> str:
        return f"batch {self.batch}: {self.what} at {self.where}"


class OnDevice(Tensor):
    """Says that it is on the device. Its numbers are on the host."""

    numbers: Tensor
    runs_on: FakeCuda

    @staticmethod
    def __new__(cls, numbers: Tensor, runs_on: FakeCuda) -> OnDevice:
        self = Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
        )
        self.numbers = numbers
        self.runs_on = runs_on
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.numbers})"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def record_stream(self, stream: Any) -> None:
        """The host hands out no memory that is still in use."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer what torch would answer by where tensors really are."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass(), _makes_more("device" not in kwargs):
            if func is Tensor.to:
                return _to(*args, **kwargs)
            if func is Tensor.cpu:
                return _to(args[0], HOST)
            if func is Tensor.tolist:
                return _to(args[0], HOST).tolist()
            if func is Tensor.numpy:
                raise TypeError("a tensor on cuda:0 has no numpy()")
            if func in NUMBERS:
                args[0].runs_on.wait(f"{func.__name__}()")
                return func(args[0].numbers, *args[1:])
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} on a device that has been taken away")


#: Whether what torch makes on its own account, inside of one of its functions, is made on the device.
_makes: list[bool] = [False]


@contextmanager
def _makes_more(on_device: bool) -> Iterator[None]:
    _makes.append(on_device)
    try:
        yield
    finally:
        _makes.pop()


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type == tensor.device.type:
        return tensor.to(dtype or tensor.dtype, copy=copy)
    with _makes_more(on_device=False):
        moved: Tensor = torch.ops.aten._to_copy(tensor, dtype=dtype, device=device, non_blocking=non_blocking)
    return moved


class Stream:
    """Numbers on their way to the host, in order. On the device there is nothing to be waited for."""

    def __init__(self, cuda: FakeCuda, *_: Any) -> None:
        self.device = DEVICE
        self.arrived = 0
        self.under_way: list[Callable[[], Any]] = []
        self._cuda = cuda

    def arrive(self, until: int | None = None) -> None:
        """Hand over what was sent, or the first of it."""
        n = len(self.under_way) if until is None else max(0, until - self.arrived)
        now, self.under_way = self.under_way[:n], self.under_way[n:]
        self.arrived += len(now)
        for hand_over in now:
            hand_over()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._cuda.note("wait", "stream.synchronize()")
        self.arrive()

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


class Event:
    """A place in a stream."""

    def __init__(self, cuda: FakeCuda, **_: Any) -> None:
        self._cuda = cuda
        self._stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or self._cuda.current
        self._until = self._stream.arrived + len(self._stream.under_way)
        self._batch = self._cuda.batch

    def synchronize(self) -> None:
        if self._stream is not None:
            is_late = self._batch < self._cuda.batch
            self._cuda.note("late wait" if is_late else "wait", "event.synchronize()")
            self._stream.arrive(self._until)

    def query(self) -> bool:
        """Never done before somebody waits: the device is at its slowest."""
        return self._stream is None or self._stream.arrived >= self._until

    def wait(self, stream: Any = None) -> None: ...


class FakeCuda(TorchDispatchMode):
    """Does on the host what the device is asked for, and notes what the host waits for.

    A number that is sent to pinned memory is NaN there until somebody has waited for it.

    Attributes:
        seen: What was noted.
        batch: The running batch, as a `Watch` among the callbacks tells it.
        current: The stream that is asked now.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Sight] = []
        self.batch = -1
        self.current = self.main = Stream(self)
        self._streams = [self.main]
        self._pinned: dict[int, Tensor] = {}

    def note(self, kind: Kind, what: str) -> None:
        frame: FrameType | None = sys._getframe(1)
        outer = []
        while frame is not None:
            outer.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        own = next((line for line in outer if line[0].startswith(f"{PACKAGE}{os.sep}")), None)
        file, line = own or next(
            line for line in outer if line[0] != __file__ and f"{os.sep}torch{os.sep}_" not in line[0]
        )
        where = f"{Path(file).relative_to(PACKAGE.parent).as_posix() if own else file}:{line}"
        aside = self.current is not self.main
        self.seen.append(Sight(kind, what, where, own is not None, self.batch, aside))

    def new_stream(self, *_: Any, **__: Any) -> Stream:
        self._streams.append(Stream(self))
        return self._streams[-1]

    @contextmanager
    def on_stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def synchronize(self, *_: Any) -> None:
        self.note("wait", "torch.cuda.synchronize()")
        for stream in self._streams:
            stream.arrive()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        wrapped: dict[int, OnDevice] = {}

        def unwrap(value: Any) -> Any:
            if isinstance(value, OnDevice):
                wrapped[id(value.numbers)] = value
                return value.numbers
            return value

        args = tuple(_each(unwrap, value) for value in args)
        kwargs = {key: _each(unwrap, value) for key, value in (kwargs or {}).items()}
        on_device = bool(wrapped)
        if kwargs.get("device") is not None:
            on_device = _makes[-1] or kwargs["device"].type == DEVICE.type
            kwargs["device"] = HOST
        pinned = kwargs.pop("pin_memory", False)
        if wrapped and _is_read(name, args, wrapped):
            self.wait(f"{name}()")
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        copies = [
            (target, source)
            for target, source in _copies(name, args)
            if (id(source) in wrapped) != (on_device if target is None else id(target) in wrapped)
        ]
        for _, source in copies:
            if id(source) not in wrapped:
                self._to_device(non_blocking and self._is_pinned(source))
        out = func(*args, **kwargs)
        for target, source in copies:
            if id(source) in wrapped:
                # what torch makes for a copy that does not block is pinned
                is_sent = non_blocking and (target is None or self._is_pinned(target))
                self._to_host(out if target is None else target, is_sent)

        def wrap(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if pinned:
                self._pin(value)
            if (known := wrapped.get(id(value))) is not None:
                return known
            return OnDevice(value, self) if on_device else value

        return _each(wrap, out)

    def wait(self, what: str) -> None:
        self.note("wait", what)
        self.current.arrive()

    def _to_device(self, is_sent: bool) -> None:
        if not is_sent:
            self.wait("copy to the device")
        for stream in self._streams:  # the device keeps the order of copies to and from pinned memory
            stream.arrive()

    def _to_host(self, target: Tensor, is_sent: bool) -> None:
        if not is_sent:
            self.wait("copy to the host")
            return
        self.note("send", "copy to pinned memory")
        self._pin(target)
        numbers = target.clone()
        if target.is_floating_point():
            target.fill_(torch.nan)
        self.current.under_way.append(partial(target.copy_, numbers))

    def _pin(self, tensor: Tensor) -> None:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no other gets its place

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned


def _each(act: Callable[[Any], Any], value: Any) -> Any:
    """On a value or, as operations take and give no deeper ones, on those in a list."""
    return type(value)(map(act, value)) if type(value) in (list, tuple) else act(value)


def _copies(name: str, args: Sequence[Any]) -> list[tuple[Tensor | None, Tensor]]:
    """Targets, where there are any yet, and sources."""
    if name == "_to_copy":
        return [(None, args[0])]
    if name == "copy_":
        return [(args[0], args[1])]
    return list(zip(args[0], args[1], strict=True)) if name == "_foreach_copy_" else []


def _is_read(name: str, args: Sequence[Any], on_device: Collection[int]) -> bool:
    if name in ("index", "index_put", "index_put_"):
        places = [place for place in args[1] if place is not None]
        masks = [place for place in places if place.dtype in (torch.bool, torch.uint8)]
        # one number for all that is masked needs no count of them
        is_counted = bool(masks) and (name == "index" or args[2].numel() > 1)
        return is_counted or any(id(place) not in on_device for place in places)
    return name in READS


def _as_told(group: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """Groups of tensors by where they say that they are: optimizers move what is alike to each of them."""

    def grouped(*args: Any) -> dict[Any, Any]:
        return {(lists[0][0].device, kind): (lists, i) for (_, kind), (lists, i) in group(*args).items()}

    return grouped


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None: ...


class Watch(pl.Callback):
    """Tells which batch is running. First in the list, so that all that the others do belongs to it."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.cuda.batch = batch_idx


def strategy() -> SingleDeviceStrategy:
    """What a Trainer needs to take the device for its own."""
    return SingleDeviceStrategy(DEVICE, accelerator=_Accelerator())


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """There is a device until the context is left; `cuda:0` is its only name."""
    cuda = FakeCuda()
    lifts = torch._C._only_lift_cpu_tensors()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, cuda:
        group = torch._C._group_tensors_by_device_and_dtype
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", _as_told(group))
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", partial(Event, cuda))
        patch.setattr(torch.cuda, "Stream", cuda.new_stream)
        patch.setattr(torch.cuda, "stream", cuda.on_stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_: cuda.current)
        patch.setattr(torch.cuda, "synchronize", cuda.synchronize)
        torch._C._set_only_lift_cpu_tensors(True)  # else `torch.tensor(..., device=...)` is not seen
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # parameters become others
        try:
            yield cuda
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)
