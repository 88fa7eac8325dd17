"""Tensors that report the device `cuda:0` and keep their numbers on the host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.fake_cuda.device import FakeCuda

DEVICE = torch.device("cuda", 0)
HOST = torch.device("cpu")
#: Methods that give a number to the host; `torch.tensor` calls them without notice to a dispatch mode.
NUMBERS = {
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__format__,
    Tensor.__index__,
    Tensor.__int__,
    Tensor.item,
}


class OnDevice(Tensor):
    """A tensor on the host that reports `cuda:0` as its device."""

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
        """Does nothing: the host does not reuse memory that is in use."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Handles the functions that torch would decide by the true device of a tensor."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass(), _creating("device" not in kwargs):
            if func is Tensor.to:
                return _to(*args, **kwargs)
            if func is Tensor.cpu:
                return _to(args[0], HOST)
            if func is Tensor.tolist:
                return _to(args[0], HOST).tolist()
            if func is Tensor.numpy:
                raise TypeError("a tensor on cuda:0 has no numpy()")
            if func in NUMBERS:
                args[0].runs_on.sync(f"{func.__name__}()")
                return func(args[0].numbers, *args[1:])
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func} outside of `fake_cuda()`")


#: True while tensors that torch creates within its own functions belong to the device.
creates_on_device: list[bool] = [False]


@contextmanager
def _creating(on_device: bool) -> Iterator[None]:
    creates_on_device.append(on_device)
    try:
        yield
    finally:
        creates_on_device.pop()


def _to(tensor: Tensor, *args: Any, copy: bool = False, **kwargs: Any) -> Tensor:
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    if device is None or device.type == tensor.device.type:
        return tensor.to(dtype or tensor.dtype, copy=copy)
    with _creating(on_device=False):
        moved: Tensor = torch.ops.aten._to_copy(tensor, dtype=dtype, device=device, non_blocking=non_blocking)
    return moved
