"""Streams and events whose copies to the host complete as late as a GPU may complete them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.fake_cuda.tensors import DEVICE

if TYPE_CHECKING:
    from tests.fake_cuda.device import FakeCuda


class Stream:
    """Pending copies to the host, in order. Operations on the device complete at once."""

    def __init__(self, cuda: FakeCuda, *_: Any) -> None:
        self.device = DEVICE
        self.completed = 0
        self.pending: list[Callable[[], Any]] = []
        self._cuda = cuda

    def complete(self, until: int | None = None) -> None:
        """Completes pending copies: all, or those up to a position."""
        n = len(self.pending) if until is None else max(0, until - self.completed)
        now, self.pending = self.pending[:n], self.pending[n:]
        self.completed += len(now)
        for copy in now:
            copy()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._cuda.record("sync", "stream.synchronize()")
        self.complete()

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...


class Event:
    """A position in a stream."""

    def __init__(self, cuda: FakeCuda, **_: Any) -> None:
        self._cuda = cuda
        self._stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._stream = stream or self._cuda.current
        self._until = self._stream.completed + len(self._stream.pending)
        self._batch = self._cuda.batch

    def synchronize(self) -> None:
        if self._stream is not None:
            is_late = self._batch < self._cuda.batch
            self._cuda.record("late sync" if is_late else "sync", "event.synchronize()")
            self._stream.complete(self._until)

    def query(self) -> bool:
        """True only after a synchronization: the device is as slow as it may be."""
        return self._stream is None or self._stream.completed >= self._until

    def wait(self, stream: Any = None) -> None: ...
