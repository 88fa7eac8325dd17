"""Executes operations of the device on the host, and records where the host synchronizes with it."""

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

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_gradguard
from tests.fake_cuda.streams import Stream
from tests.fake_cuda.tensors import DEVICE, HOST, OnDevice, creates_on_device

PACKAGE = Path(lightning_gradguard.__file__).parent
FAKE = f"{Path(__file__).parent}{os.sep}"
#: Operations that give a number to the host, or a tensor whose size depends on values.
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

Kind = Literal["sync", "late sync", "send"]


@dataclass(frozen=True)
class Interaction:
    """A synchronization of the host with the device, or a copy between them.

    Args:
        kind: `"sync"` if the host synchronizes with work of this batch; `"late sync"` if only with
            work of an earlier one; `"send"` for a copy to the host that does not block.
        what: A short description.
        where: File and line; those of the package if it is on the call stack.
        is_own: True if the package is on the call stack.
        batch: The batch that is running.
        aside: True on a stream other than that of training.
    """

    kind: Kind
    what: str
    where: str
    is_own: bool
    batch: int
    aside: bool

    def __str__(self) -> str:
        return f"batch {self.batch}: {self.what} at {self.where}"


class FakeCuda(TorchDispatchMode):
    """Executes operations of the device on the host, and records synchronizations of the host.

    A number that is copied to pinned memory is NaN there until the copy is synchronized with.

    Attributes:
        seen: Everything recorded.
        batch: The running batch, set by a `BatchTracker` among the callbacks.
        current: The current stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Interaction] = []
        self.batch = -1
        self.current = self.main = Stream(self)
        self._streams = [self.main]
        self._pinned: dict[int, Tensor] = {}

    def record(self, kind: Kind, what: str) -> None:
        frame: FrameType | None = sys._getframe(1)
        outer = []
        while frame is not None:
            outer.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        own = next((line for line in outer if line[0].startswith(f"{PACKAGE}{os.sep}")), None)
        file, line = own or next(
            line
            for line in outer
            if not line[0].startswith(FAKE) and f"{os.sep}torch{os.sep}_" not in line[0]
        )
        where = f"{Path(file).relative_to(PACKAGE.parent).as_posix() if own else file}:{line}"
        aside = self.current is not self.main
        self.seen.append(Interaction(kind, what, where, own is not None, self.batch, aside))

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
        self.record("sync", "torch.cuda.synchronize()")
        for stream in self._streams:
            stream.complete()

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
            on_device = creates_on_device[-1] or kwargs["device"].type == DEVICE.type
            kwargs["device"] = HOST
        pinned = kwargs.pop("pin_memory", False)
        if wrapped and _is_read(name, args, wrapped):
            self.sync(f"{name}()")
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
                # torch allocates the target of a copy that does not block in pinned memory
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

    def sync(self, what: str) -> None:
        self.record("sync", what)
        self.current.complete()

    def _to_device(self, is_sent: bool) -> None:
        if not is_sent:
            self.sync("copy to the device")
        for stream in self._streams:  # the device keeps the order of copies
            stream.complete()

    def _to_host(self, target: Tensor, is_sent: bool) -> None:
        if not is_sent:
            self.sync("copy to the host")
            return
        self.record("send", "copy to pinned memory")
        self._pin(target)
        numbers = target.clone()
        if target.is_floating_point():
            target.fill_(torch.nan)
        self.current.pending.append(partial(target.copy_, numbers))

    def _pin(self, tensor: Tensor) -> None:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that its address is not reused

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned


def _each(act: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to a value, or to the values of a list; operations nest no deeper."""
    return type(value)(map(act, value)) if type(value) in (list, tuple) else act(value)


def _copies(name: str, args: Sequence[Any]) -> list[tuple[Tensor | None, Tensor]]:
    """Returns targets, `None` where there is none yet, and sources."""
    if name == "_to_copy":
        return [(None, args[0])]
    if name == "copy_":
        return [(args[0], args[1])]
    return list(zip(args[0], args[1], strict=True)) if name == "_foreach_copy_" else []


def _is_read(name: str, args: Sequence[Any], on_device: Collection[int]) -> bool:
    if name in ("index", "index_put", "index_put_"):
        places = [place for place in args[1] if place is not None]
        masks = [place for place in places if place.dtype in (torch.bool, torch.uint8)]
        # a single number for all masked elements needs no count of them
        is_counted = bool(masks) and (name == "index" or args[2].numel() > 1)
        return is_counted or any(id(place) not in on_device for place in places)
    return name in READS
