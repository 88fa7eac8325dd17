"""Fine-tuning with `exclude`: unit-wise clipping for the trained body, none for the new head.

A network trained on the digits 0 to 4 gets a new head, initialized to zero, for the digits 5 to 9. Unit-wise
clipping bounds a gradient by the norm of its weights, so that a head of zeros would hardly train: it is
excluded by name. Run it as `python examples/fine_tuning.py`.
"""

import copy

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import AdaptiveGradientClipping, UnitwiseClipping


class Network(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))  # type: ignore[no-any-return]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def digits(first: int) -> TensorDataset:
    """scikit-learn's images of five digits, labelled from 0."""
    inputs, target = load_digits(return_X_y=True)
    images, labels = torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(target) - first
    wanted = (labels >= 0) & (labels < 5)
    return TensorDataset(images[wanted], labels[wanted])


def fit(network: Network, data: TensorDataset, callbacks: list[pl.Callback], max_steps: int) -> None:
    trainer = pl.Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(network, DataLoader(data, batch_size=32, shuffle=True))


def main(max_steps: int = 100) -> dict[str, float]:
    pl.seed_everything(0, verbose=False)
    trained, data = Network(), digits(first=5)
    fit(trained, digits(first=0), [], max_steps=200)
    nn.init.zeros_(trained.head.weight)
    nn.init.zeros_(trained.head.bias)
    held_out, target = data[600:]
    accuracies = {}
    for name, exclude in (("with the head clipped", []), ("with the head excluded", ["head"])):
        pl.seed_everything(0, verbose=False)
        network = copy.deepcopy(trained)
        clipping = AdaptiveGradientClipping(UnitwiseClipping(clipping=0.01), exclude=exclude)
        fit(network, TensorDataset(*data[:600]), [clipping], max_steps)
        accuracies[name] = float((network.eval()(held_out).argmax(1) == target).float().mean())
    print(
        "accuracy on the new digits:", ", ".join(f"{value:.2f} {name}" for name, value in accuracies.items())
    )
    return accuracies


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
