"""A simulated GPU: tensors on the host that report `cuda:0`, with a record of every host synchronization.

Real numbers are computed, on the CPU, so that a real `Trainer.fit` trains and decides as usual. Torch's
`FakeTensorMode` has devices without hardware too, but no numbers; and in a build without CUDA it has no
backward pass on them. For torch's own C++ code the tensors are on the CPU: code paths of a real GPU are not
covered here, but by the tests on one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch

from tests.fake_cuda.device import FakeCuda, Interaction, Kind
from tests.fake_cuda.streams import Event
from tests.fake_cuda.tensors import DEVICE
from tests.fake_cuda.training import BatchTracker, strategy

__all__ = ["DEVICE", "BatchTracker", "FakeCuda", "Interaction", "Kind", "fake_cuda", "strategy"]


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Provides the device `cuda:0` within the context."""
    cuda = FakeCuda()
    lifts = torch._C._only_lift_cpu_tensors()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch, cuda:
        group = torch._C._group_tensors_by_device_and_dtype
        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", _by_reported_device(group))
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "Event", partial(Event, cuda))
        patch.setattr(torch.cuda, "Stream", cuda.new_stream)
        patch.setattr(torch.cuda, "stream", cuda.on_stream)
        patch.setattr(torch.cuda, "current_stream", lambda *_: cuda.current)
        patch.setattr(torch.cuda, "synchronize", cuda.synchronize)
        torch._C._set_only_lift_cpu_tensors(True)  # else `torch.tensor(..., device=...)` is not dispatched
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.to()` replaces parameters
        try:
            yield cuda
        finally:
            torch._C._set_only_lift_cpu_tensors(lifts)
            torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def _by_reported_device(group: Callable[..., dict[Any, Any]]) -> Callable[..., dict[Any, Any]]:
    """Groups tensors by the device they report: optimizers move the tensors of a group together."""

    def grouped(*args: Any) -> dict[Any, Any]:
        return {(lists[0][0].device, kind): (lists, i) for (_, kind), (lists, i) in group(*args).items()}

    return grouped
