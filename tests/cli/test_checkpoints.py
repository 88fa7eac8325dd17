"""Weights are read from files that torch has saved on any device, and loaded if they fit the module."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_gradguard.cli.checkpoints import load_weights, read_checkpoint
from lightning_gradguard.cli.messages import UsageError


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Remembers(Net):
    """Has state that is no tensor, which not every file has kept."""

    def get_extra_state(self) -> Any:
        return {"seen": 3}

    def set_extra_state(self, state: Any) -> None:
        self.seen = state["seen"]


def test_weights_are_loaded() -> None:
    module = Net()
    load_weights(module, {name: torch.full_like(w, 3.0) for name, w in module.state_dict().items()})
    assert module.layer.weight.eq(3).all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"head.weight": torch.zeros(2)}, "do not fit Net: the module has no head.weight. Give"),
        ({"layer.bias": None}, "do not fit Net: layer.bias is missing in them. Give"),
        (
            {"layer.bias": torch.zeros(3)},
            r"layer.bias is \(3,\) there, \(2,\) in the module. Give",
        ),
        ({"layer.bias": None, "a": torch.zeros(1)}, "layer.bias is missing in them; and 1 more. Give"),
    ],
)
def test_weights_that_do_not_fit(changed: dict[str, Any], message: str) -> None:
    weights = {name: w for name, w in {**Net().state_dict(), **changed}.items() if w is not None}
    with pytest.raises(UsageError, match=message):
        load_weights(Net(), weights)


def test_extra_state_may_be_missing() -> None:
    module = Remembers()
    load_weights(module, Net().state_dict())
    load_weights(module, Remembers().state_dict())
    assert module.seen == 3


def test_weights_of_gpu_are_read_on_cpu() -> None:
    torch.save(Net().state_dict(), "here.pt")
    # the file names the device
    with zipfile.ZipFile("here.pt") as here, zipfile.ZipFile("there.pt", "w") as there:
        for entry in here.infolist():
            there.writestr(entry.filename, here.read(entry).replace(b"cpu", b"xpu"))
    assert b"xpu" in Path("there.pt").read_bytes()
    weights = read_checkpoint("there.pt", "--checkpoint")["state_dict"]
    assert weights["layer.weight"].device.type == "cpu"


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"state_dict": None}, {"step": 3}])
def test_file_without_weights(content: Any) -> None:
    torch.save(content, "other.pt")
    with pytest.raises(UsageError, match=r"--checkpoint other.pt holds no weights by their names."):
        read_checkpoint("other.pt", "--checkpoint")
