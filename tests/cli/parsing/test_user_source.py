"""A user's module is imported once, and a script without a guard not at all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_gradguard.cli.main import main

NET = """
import pytorch_lightning as pl, torch

with open("imported", "a") as file:
    file.write("x")

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
"""
RUNS = {
    "trainer.fit(module, loader)": "fit()",
    "if True:\n    pl.Trainer().fit(Net())": "fit()",
    "from pytorch_lightning.cli import LightningCLI\ncli = LightningCLI(Net)": "LightningCLI()",
    "def main(): ...\nmain()": "main()",
    "def a():\n    b()\ndef b():\n    pl.Trainer().fit(Net())\nif True:\n    a()": "a()",
}


def run(source: str, verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    Path("scripted.py").write_text(NET + source)
    monkeypatch.delitem(sys.modules, "scripted", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stopped:
        main([verb, *(["incidents/6"] if verb == "replay" else []), "--model", "scripted.Net"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize("verb", ["replay", "check", "fit"])
@pytest.mark.parametrize("source", RUNS)
def test_a_script_is_not_imported(
    source: str, verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = run(source, verb, capsys, monkeypatch)
    assert error.startswith(f"lightning-gradguard {verb}: scripted.py was not imported, as that calls ")
    assert f" {RUNS[source]} in line " in error
    assert not Path("imported").exists()


@pytest.mark.parametrize("source", ["raise OSError('no data')", "raise SystemExit(3)", "import no_such"])
@pytest.mark.parametrize("verb", ["replay", "check"])
def test_a_module_that_fails_is_run_once(
    source: str, verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = run(source, verb, capsys, monkeypatch)
    assert "--model scripted.Net: importing scripted failed with" in error
    assert Path("imported").read_text() == "x"


def test_a_guarded_script_is_imported_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def main():\n    pl.Trainer().fit(Net())\n\nif __name__ == '__main__':\n    main()"
    error = run(source, "replay", capsys, monkeypatch)
    assert "there is no dossier in incidents/6" in error
    assert Path("imported").read_text() == "x"
