"""Bash completes verbs, options and files, and starts no Python for it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lightning_gradguard.cli.completion import script
from lightning_gradguard.cli.main import VERBS
from tests.cli.conftest import Command

OPTIONS = {"fit": ["--model", "--nan_rollback", "--nan_rollback.patience"], "demo": ["--seed"]}


def completed(text: str, *words: str) -> list[str]:
    """What a real bash offers for the last word; with nothing on the path that could be started."""
    Path("completion.bash").write_text(text)
    typed = " ".join(f"'{word}'" for word in words)
    program = (
        f"PATH=; source completion.bash; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1};"
        " complete -p lightning-gradguard; _lightning_gradguard; printf '%s\\n' \"${COMPREPLY[@]}\""
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", program], capture_output=True, text=True, check=True, timeout=10
    )
    assert done.stderr == ""
    first, *offered = done.stdout.splitlines()
    assert first == "complete -o filenames -F _lightning_gradguard lightning-gradguard"
    return offered


def test_bash_completes() -> None:
    Path("config.yaml").touch()
    Path("runs").mkdir()
    text, name = script("bash", OPTIONS), "lightning-gradguard"
    assert completed(text, name, "") == ["fit", "demo"]
    assert completed(text, name, "d") == ["demo"]
    assert completed(text, name, "fit", "--nan") == ["--nan_rollback", "--nan_rollback.patience"]
    assert completed(text, name, "fit", "--model", "my.Net", "--nan_rollback.") == ["--nan_rollback.patience"]
    assert completed(text, name, "demo", "--") == ["--seed"]
    assert completed(text, name, "fit", "-c", "con") == ["config.yaml"]
    assert completed(text, name, "fit", "ru") == ["runs"]
    assert completed(text, name, "fit", "nothing") == [""]
    for odd in ("a b.yaml", "a *.yaml"):
        Path(odd).touch()
    assert sorted(completed(text, name, "fit", "-c", "a")) == ["a *.yaml", "a b.yaml"]


def test_the_script_knows_all_verbs_and_options(command: Command) -> None:
    code, text, _ = command("completion", "bash")
    assert code == 0
    name = "lightning-gradguard"
    assert completed(text, name, "") == list(VERBS)
    fit = completed(text, name, "fit", "--")
    assert {"--model", "--data", "--config", "--ckpt_path", "--help", "--trainer.max_steps"} <= set(fit)
    assert {"--learning_rate_backoff", "--learning_rate_backoff.factor"} <= set(fit)
    assert not [option for option in fit if "NAME" in option]
    assert {"--json", "--trainer.max_steps"} <= set(completed(text, name, "check", "--"))
    assert {"--checkpoint", "--model", "--config"} <= set(completed(text, name, "replay", "--"))
    assert {"--max_steps", "--seed", "--logdir", "--help"} == set(completed(text, name, "demo", "--"))
    assert {"--json", "--html"} <= set(completed(text, name, "report", "--"))


def test_zsh_is_told_the_same(command: Command) -> None:
    text = script("zsh", OPTIONS)
    assert text.startswith("#compdef lightning-gradguard\n")
    assert "compadd -- fit demo" in text
    assert "        demo) options=(--seed) ;;" in text
    code, whole, _ = command("completion", "zsh")
    assert (code, "--learning_rate_backoff.factor" in whole) == (0, True)


@pytest.mark.parametrize("arguments", [(), ("fish",), ("bash", "zsh")])
def test_another_shell(command: Command, arguments: tuple[str, ...]) -> None:
    code, out, err = command("completion", *arguments)
    assert (code, out) == (2, "")
    assert "name one shell, bash or zsh; given was" in err


def test_help(command: Command) -> None:
    code, out, _ = command("completion", "--help")
    assert (code, "bash-completion/completions/lightning-gradguard" in out) == (0, True)
