"""A current folder with a module in it, and the command that is run there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_gradguard.cli.main import main

Command = Callable[..., tuple[int, str, str]]

QUIET = (
    "--seed_everything=0",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
NAMES = (
    "initialization_check",
    "gradient_norm_monitor",
    "nan_rollback",
    "adaptive_gradient_clipping",
    "learning_rate_backoff",
)

MINE = """\
import dataclasses
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import InitializationCheck, NaNRollback


@dataclasses.dataclass
class Size:
    width: int = 8


class Net(pl.LightningModule):
    def __init__(self, width: int = 8, depth: int = 1, activation: str = "ReLU"):
        super().__init__()
        layers = [torch.nn.Linear(20, width)]
        for _ in range(depth):
            layers += [getattr(torch.nn, activation)(), torch.nn.Linear(width, width)]
        self.net = torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(width, 4))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Own(Net):
    def train_dataloader(self):
        return Data().train_dataloader()


class Saves(Own):
    def __init__(self, width: int = 8):
        super().__init__(width)
        self.save_hyperparameters()


class Manual(Own):
    def __init__(self):
        super().__init__(depth=30, activation="Sigmoid")
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(super().training_step(batch, batch_idx))
        self.optimizers().step()


class Poisoned(Own):
    def __init__(self):
        super().__init__()
        self.net[0].weight.data[0, 0] = float("nan")


class Noisy(Own):
    def training_step(self, batch, batch_idx):
        print("a step")
        return super().training_step(batch, batch_idx)


class Fails(Net):
    def __init__(self):
        super().__init__()
        raise RuntimeError("no such table")


class FailsInStep(Own):
    def training_step(self, batch, batch_idx):
        raise KeyError("label")


class Untrainable(pl.LightningModule):
    def train_dataloader(self):
        return Data().train_dataloader()


class Data(pl.LightningDataModule):
    def __init__(self, size: int = 64):
        super().__init__()
        self.size = size

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(self.size, 20, generator=generator)
        return DataLoader(TensorDataset(inputs, torch.arange(self.size) % 4), 8)


class NoBatches(Data):
    def train_dataloader(self):
        return []


class Rollback(NaNRollback):
    pass


class Validated(Net):
    def validation_step(self, batch, batch_idx):
        pass


class NeedsWidth(Own):
    def __init__(self, width: int):
        super().__init__(width)


class Sized(Own):
    def __init__(self, size: Size = Size()):
        super().__init__(size.width)


class Stores(Own):
    def on_save_checkpoint(self, checkpoint):
        checkpoint["size"] = Size()


class Copies(Own):
    def on_load_checkpoint(self, checkpoint):
        checkpoint["state_dict"]["net.2.weight"].fill_(0.1)


class WithCallbacks(Own):
    def configure_callbacks(self):
        assert self.trainer.fit_loop is not None  # Lightning asks when there is a Trainer
        return [NaNRollback(patience=9), InitializationCheck(), Leaves("configured")]


class WithSubclass(Own):
    def configure_callbacks(self):
        return Rollback()


class Leaves(pl.Callback):
    def __init__(self, file: str = "constructed"):
        Path(file).touch()

    def on_exception(self, trainer, pl_module, exception):
        Path("excepted").touch()


class Logs(pl.loggers.CSVLogger):
    def __init__(self):
        super().__init__("logged")
        Path("logged").touch()


class LeavesRollback(NaNRollback):
    def __init__(self):
        super().__init__()
        Path("rollback").touch()


class NoValidation(Data):
    def val_dataloader(self):
        raise FileNotFoundError("val")


class NonfiniteData(Data):
    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.dataset.tensors[0][3, 2] = float("nan")
        return loader
"""


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores `sys.path`, which the command extends by the current folder."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def mine(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module `mine` in it."""
    Path("mine.py").write_text(MINE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return Path.cwd()


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command; returns the exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


def saved(version: int = 0) -> dict[str, Any]:
    """Returns the configuration that a run has saved."""
    config: dict[str, Any] = yaml.safe_load(Path(f"lightning_logs/version_{version}/config.yaml").read_text())
    return config


def callbacks_of(version: int = 0) -> set[str]:
    """Returns the names of the callbacks with a state in the checkpoint of a run."""
    (path,) = Path(f"lightning_logs/version_{version}/checkpoints").iterdir()
    return {key.partition("{")[0] for key in torch.load(path, weights_only=True)["callbacks"]}
