"""Shells complete commands, options and values, by a script of shtab that starts no Python."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest

from lightning_gradguard.cli.main import VERBS
from tests.cli.conftest import Command

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def scripts() -> dict[str, str]:
    """The scripts by shell, of a process without test classes, hundreds of which would be options."""
    pytest.importorskip("shtab")
    program = (
        "import json; from lightning_gradguard.cli.completion import script; "
        "print(json.dumps({shell: script(shell) for shell in ('bash', 'zsh')}))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=150)
    assert done.stderr == ""
    return cast(dict[str, str], json.loads(done.stdout))


@pytest.fixture
def bash(scripts: dict[str, str]) -> str:
    """The script of bash."""
    return scripts["bash"]


def completed(text: str, *words: str) -> set[str]:
    """Returns what a real bash offers for the last word; with nothing in the path that could be started."""
    Path("completion.bash").write_text(text)
    line = " ".join(f"'{word}'" for word in ("lightning-gradguard", *words))
    program = (
        f"PATH=; source completion.bash; COMP_WORDS=({line}); COMP_CWORD={len(words)};"
        " _shtab_lightning_gradguard; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, check=True, timeout=30
    )
    return {offer.rstrip() for offer in done.stdout.splitlines()}


def test_bash_completes_verbs_and_options(bash: str) -> None:
    assert completed(bash, "") == set(VERBS)
    assert completed(bash, "d") == {"demo"}
    fit = completed(bash, "fit", "--")
    assert {"--model", "--data", "--config", "--ckpt_path", "--help", "--trainer.max_steps"} <= fit
    assert {"--learning_rate_backoff", "--learning_rate_backoff.factor"} <= fit
    assert {"--json", "--trainer.max_steps"} <= completed(bash, "check", "--")
    assert {"--checkpoint", "--model", "--config"} <= completed(bash, "replay", "--")
    assert completed(bash, "demo", "--") == {"--max_steps", "--seed", "--logdir", "--help"}
    assert {"--json", "--html"} <= completed(bash, "report", "--")
    assert completed(bash, "completion", "") == {"bash", "zsh"}


def test_bash_completes_values_and_files(bash: str) -> None:
    Path("config.yaml").touch()
    Path("runs").mkdir()
    assert completed(bash, "fit", "--nan_rollback.check", "") == {"exact", "deferred"}
    policies = completed(bash, "fit", "--adaptive_gradient_clipping.policy", "")
    assert "lightning_gradguard.PercentileClipping" in policies
    assert completed(bash, "fit", "-c", "con") == {"config.yaml"}
    assert completed(bash, "replay", "ru") == {"runs"}
    assert completed(bash, "report", "ru") == {"runs"}


def test_zsh_has_the_same_options(scripts: dict[str, str]) -> None:
    out = scripts["zsh"]
    assert out.startswith("#compdef lightning-gradguard\n")
    assert "--learning_rate_backoff.factor" in out


def test_missing_shtab_names_the_extra(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "lightning_gradguard.cli.completion.find_spec", lambda name: None if name == "shtab" else find(name)
    )
    assert command("completion", "bash") == (
        2,
        "",
        "lightning-gradguard completion: this needs shtab: pip install 'lightning-gradguard[completion]'\n",
    )


@pytest.mark.parametrize("arguments", [(), ("fish",), ("bash", "zsh")])
def test_wrong_shell(command: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = command("completion", *arguments)
    assert (code, out) == (2, "")
    assert "lightning-gradguard completion: error: " in err


def test_help_shows_where_to_save_the_script(command: Command) -> None:
    code, out, _ = command("completion", "--help")
    assert (code, "bash-completion/completions/lightning-gradguard" in out) == (0, True)
