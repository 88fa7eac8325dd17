"""The command runs its verbs, and imports neither torch nor Lightning for its help."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lightning_gradguard
from lightning_gradguard.cli.main import VERBS
from tests.cli.conftest import Command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fitt"], "lightning-gradguard: no command 'fitt'. Did you mean fit?\n"),
        (["bake"], "no command 'bake'. There are: fit, check, treat, report, replay, demo, completion."),
        (["demo", "--max_steps", "0"], "--max_steps 0 must be at least 1"),
        (["report", "none"], "lightning-gradguard report: "),
    ],
)
def test_wrong_input_is_one_message_and_code_two(
    command: Command, arguments: list[str], message: str
) -> None:
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert len(err.splitlines()) <= 12


def test_help_lists_verbs(command: Command) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        code, out, _ = command(*arguments)
        assert code == 0
        assert [line.split()[0] for line in out.splitlines() if line.startswith("  ")] == list(VERBS)
    assert list(VERBS) == ["fit", "check", "treat", "report", "replay", "demo", "completion"]
    assert command("--version") == (0, f"{lightning_gradguard.__version__}\n", "")


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_have_help(command: Command, verb: str) -> None:
    code, out, err = command(verb, "--help")
    assert (code, err) == (0, "")
    assert f"lightning-gradguard {verb}" in out


def test_help_and_version_import_no_torch() -> None:
    program = (
        "import sys; from lightning_gradguard.cli.main import main;"
        "main(['--help']); main(['--version']); main(['completion', '--help']);"
        "assert not {'torch', 'pytorch_lightning', 'lightning', 'jsonargparse'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
