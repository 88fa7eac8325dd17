"""Programs that the tests of treatments share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import TreatmentResult, treat

#: Trainer arguments of a run that is planned to be short.
SHORT = {"max_steps": 60}


class Data(pl.LightningDataModule):
    """Four classes by a linear teacher, in batches of 32; the validation data are of the same kind."""

    def __init__(self, scale: float = 1.0, has_validation: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(960, 8, generator=generator)
        y = (x @ torch.randn(8, 4, generator=generator)).argmax(1)
        self.training = TensorDataset(x[:640] * scale, y[:640])
        self.validation = TensorDataset(x[640:] * scale, y[640:])
        self.has_validation = has_validation

    def train_dataloader(self) -> Any:
        return DataLoader(self.training, 32, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.validation, 64) if self.has_validation else []


class Net(pl.LightningModule):
    """Linear layers with an activation after each but the last, under Adam."""

    def __init__(
        self, depth: int = 2, activation: Callable[[], nn.Module] = nn.ReLU, rate: float = 1e-2
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [nn.Linear(8 if i == 0 else 24, 24), activation()]
        self.net = nn.Sequential(*layers, nn.Linear(24, 4))
        self.rate = rate

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.rate)


def treated(make: Callable[[], pl.LightningModule], data: Any = None, **options: Any) -> TreatmentResult:
    """Treats a short program in this process; nothing is printed."""
    arguments: dict[str, Any] = {
        "trainer": SHORT,
        "budget": "10m",
        "processes": 1,
        "progress": lambda _: None,
    }
    return treat(make, Data() if data is None else data, **{**arguments, **options})


class Deep(Net):
    """Six layers of sigmoids: gradients vanish."""

    def __init__(self) -> None:
        super().__init__(6, nn.Sigmoid)
