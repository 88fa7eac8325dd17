"""Weights are read from what torch has saved, wherever that was, and fit the module or are refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lightning_gradguard.cli.checkpoints import load_weights, read_checkpoint
from lightning_gradguard.cli.errors import UsageError


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
    ("changed", "said"),
    [
        ({"head.weight": torch.zeros(2)}, "do not fit Net: the module has no head.weight. Give"),
        ({"layer.bias": None}, "do not fit Net: layer.bias is missing in them. Give"),
        ({"layer.bias": torch.zeros(3)}, r"do not fit Net: layer.bias is \(3,\), the module's \(2,\). Give"),
        ({"layer.bias": None, "a": torch.zeros(1)}, "layer.bias is missing in them and 1 more. Give"),
    ],
)
def test_weights_that_do_not_fit(changed: dict[str, Any], said: str) -> None:
    weights = {name: w for name, w in {**Net().state_dict(), **changed}.items() if w is not None}
    with pytest.raises(UsageError, match=said):
        load_weights(Net(), weights)


def test_extra_state_may_be_missing() -> None:
    module = Remembers()
    load_weights(module, Net().state_dict())
    load_weights(module, Remembers().state_dict())
    assert module.seen == 3


def test_what_a_gpu_has_saved_is_read_without_one() -> None:
    torch.save(Net().state_dict(), "here.pt")
    # the name of the device stands in the file
    with zipfile.ZipFile("here.pt") as here, zipfile.ZipFile("there.pt", "w") as there:
        for entry in here.infolist():
            there.writestr(entry.filename, here.read(entry).replace(b"cpu", b"xpu"))
    assert b"xpu" in Path("there.pt").read_bytes()
    weights = read_checkpoint("there.pt", "--checkpoint")["state_dict"]
    assert weights["layer.weight"].device.type == "cpu"


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"state_dict": None}, {"step": 3}])
def test_a_file_of_something_else(content: Any) -> None:
    torch.save(content, "other.pt")
    with pytest.raises(UsageError, match=r"--checkpoint other.pt holds no weights by their names."):
        read_checkpoint("other.pt", "--checkpoint")
