"""`replay` says what to pass where the module needs arguments, and why a step has no dossier."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest
from torch import Tensor

from lightning_gradguard import NaNRollback
from tests.cli.test_replay import record, replayed
from tests.tasks import Batch, Classifier, batches, fit, poisoned

NEEDS = """
import pytorch_lightning as pl, torch

class Needs(pl.LightningModule):
    def __init__(self, width, *, name: str):
        super().__init__()
        {saves}
        self.net = torch.nn.Sequential(torch.nn.Linear(20, width), torch.nn.Linear(width, 4))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
"""


@pytest.mark.parametrize("saves", [True, False])
def test_arguments_that_are_needed(
    saves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"needs_{saves}".lower()
    (tmp_path / f"{name}.py").write_text(NEEDS.format(saves="self.save_hyperparameters()" if saves else ""))
    monkeypatch.syspath_prepend(tmp_path)
    module = import_module(name).Needs(5, name="a b")
    dossier = record(module, poisoned(batches(12), nan=[6]), tmp_path / "run")
    monkeypatch.delitem(sys.modules, name)
    # an argument without a type is none that jsonargparse requires
    for some, needs in (
        ((), " needs --model."),
        (("--model.name", "x"), "; it needs width, which no option"),
    ):
        code, error = replayed(capsys, dossier, "--model", f"{name}.Needs", *some)
        assert code == 2
        assert needs in error
        if saves:
            assert "The run had: " in error
            assert "--model.width 5" in error or "--model.name 'a b'" in error
        else:
            assert "--config with the file that `fit` saved" in error
    given = ("--model.width", "5", "--model.name", "a b")
    code, _ = replayed(capsys, dossier, "--model", f"{name}.Needs", *given)
    assert code == 0


class Forgets(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx)


def test_a_step_without_a_dossier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Forgets(), poisoned(batches(12), nan=[6, 7]), [NaNRollback()], tmp_path)
    code, error = replayed(capsys, tmp_path / "incidents" / "7", "--model", f"{__name__}.Forgets")
    assert code == 2
    assert "Step 7 (nonfinite loss) has none: Not examined: it follows a skipped step" in error
    assert f"Name one of a step: {tmp_path / 'incidents' / '6'}." in error
    _, error = replayed(capsys, tmp_path / "incidents" / "3", "--model", f"{__name__}.Forgets")
    assert "No incident was published at step 3." in error
