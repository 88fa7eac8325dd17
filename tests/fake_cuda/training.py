"""A strategy and a callback that train on the device with a real Trainer."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.accelerators import CPUAccelerator
from pytorch_lightning.strategies import SingleDeviceStrategy

from tests.fake_cuda.device import FakeCuda
from tests.fake_cuda.tensors import DEVICE


class _Accelerator(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None: ...


class BatchTracker(pl.Callback):
    """Sets the running batch. First in the list, so that all other callbacks run within it."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        self.cuda.batch = batch_idx


def strategy() -> SingleDeviceStrategy:
    """Returns a strategy that trains on the device."""
    return SingleDeviceStrategy(DEVICE, accelerator=_Accelerator())
