"""Twelve ReLU layers in PyTorch's default initialization: rejected before step 1, repaired, trained.

Run it as `python examples/digits.py`. The same by LightningCLI: `lightning-gradguard fit -c
examples/digits.yaml`.
"""

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import InitializationCheck, InitializationError, default_callbacks


class Digits(pl.LightningDataModule):
    """scikit-learn's 1,797 images of 8 by 8 pixels; the last 397 are held out.

    Args:
        batch_size: Images in a batch.
    """

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        inputs, target = load_digits(return_X_y=True)
        images = torch.tensor(inputs, dtype=torch.float32) / 16
        self.data = TensorDataset(images[:1400], torch.tensor(target[:1400]))
        self.held_out = TensorDataset(images[1400:], torch.tensor(target[1400:]))
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, 397)


class DeepNetwork(pl.LightningModule):
    """A plain network, too deep for PyTorch's default initialization.

    Args:
        depth: Hidden layers.
        width: Units of each.
        lr: Learning rate of SGD with momentum.
    """

    def __init__(self, depth: int = 12, width: int = 64, lr: float = 0.02) -> None:
        super().__init__()
        sizes = [64] + [width] * depth
        layers: list[nn.Module] = []
        for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
            layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 10))
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = self.layers(batch[0]).argmax(1) == batch[1]
        self.log("val_accuracy", right.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def train(check: InitializationCheck, max_steps: int) -> float:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        callbacks=default_callbacks(initialization_check=check),
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    module, data = DeepNetwork(), Digits()
    trainer.fit(module, data)
    (result,) = trainer.validate(module, data, verbose=False)
    return result["val_accuracy"]


def main(max_steps: int = 600) -> tuple[float, float]:
    try:
        train(InitializationCheck(on_failure="raise"), max_steps)
    except InitializationError as error:
        print(error)
    default = train(InitializationCheck(on_failure="warn"), max_steps)
    repaired = train(InitializationCheck(on_failure="repair"), max_steps)
    print(f"accuracy on held-out digits: {default:.2f} by default, {repaired:.2f} repaired")
    return default, repaired


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
