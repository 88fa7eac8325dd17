"""A LightningCLI of your own, with the suite from YAML and by flags.

`python examples/lightning_cli.py fit -c examples/lightning_cli.yaml` trains; a flag overrides the
file (`--trainer.max_steps 100`, `--rollback.patience 5`), and one more callback is added by
`--trainer.callbacks+=lightning_gradguard.LearningRateBackoff --trainer.callbacks.factor=0.25`.
"""

from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import NaNRollback


class Digits(pl.LightningDataModule):
    """scikit-learn's 1,797 images of 8 by 8 pixels; the last 397 are held out.

    Args:
        broken: Training images that are NaN.
        batch_size: Images in a batch.
    """

    def __init__(self, broken: int = 0, batch_size: int = 32) -> None:
        super().__init__()
        inputs, target = load_digits(return_X_y=True)
        images, labels = torch.tensor(inputs, dtype=torch.float32) / 16, torch.tensor(target)
        images[:broken] = torch.nan
        self.data = TensorDataset(images[:1400], labels[:1400])
        self.held_out = TensorDataset(images[1400:], labels[1400:])
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.data, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.held_out, 397)


class Classifier(pl.LightningModule):
    """Two hidden layers.

    Args:
        width: Units of each.
        lr: Learning rate of AdamW.
    """

    def __init__(self, width: int = 64, lr: float = 3e-3) -> None:
        super().__init__()
        sizes = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        self.net = nn.Sequential(*sizes)
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        right = self.net(batch[0]).argmax(1) == batch[1]
        self.log("val_accuracy", right.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class GuardedCLI(LightningCLI):
    """Adds a `NaNRollback` to every run, with flags and a section of the file of its own: `rollback`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(NaNRollback, "rollback")

    def after_fit(self) -> None:
        rollback = self.config_init.fit.rollback
        (result,) = self.trainer.validate(self.model, self.datamodule, verbose=False)
        print(f"{rollback.skips} batches skipped; accuracy on held-out digits {result['val_accuracy']:.2f}")


def run(arguments: ArgsType = None) -> GuardedCLI:
    return GuardedCLI(Classifier, Digits, save_config_kwargs={"overwrite": True}, args=arguments)


def main(max_steps: int = 300) -> GuardedCLI:
    file = Path(__file__).with_suffix(".yaml")
    return run(["fit", "-c", str(file), "--trainer.max_steps", str(max_steps)])


if __name__ == "__main__":
    run()
