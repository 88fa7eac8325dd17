"""`lightning-gradguard report` on the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_gradguard.cli import report
from tests.report.runs import ROOT, write_events

WRONG_INPUTS: list[tuple[tuple[str, ...], str]] = [
    (("runs/version_1",), "there is no folder runs/version_1. Did you mean runs/version_0?"),
    (("rnus",), "there is no folder rnus. Did you mean runs?"),
    (("empty",), "there is neither an event file nor a metrics.csv in empty, nor in a folder below it."),
    (("runs/empty",), "There are runs nearby: runs/version_0."),
    (("runs/version_0/notes.txt",), "is a file; name the folder that it is in: runs/version_0"),
    ((), "name the folder of a run"),
    (("runs", "--html", "missing/page.html"), "missing/page.html cannot be written: No such file"),
    (("runs", "--htlm", "x"), "lightning-gradguard report: there is no --htlm. Did you mean --html?\n"),
    (("runs", "--htm", "x"), "there is no --htm. Did you mean --html?"),
    (("--nothing",), "lightning-gradguard report: there is no --nothing.\n"),
    (("runs", "--json", "missing/report.json"), "missing/report.json cannot be written: No such file"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_INPUTS)
def test_wrong_input_is_one_short_message_and_code_two(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_events("runs/version_0", {"train_loss": [1.0]})
    Path("runs/version_0/notes.txt").touch()
    Path("runs/empty").mkdir()
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert len(printed.splitlines()) == 1


def test_closed_pipe_is_not_an_error() -> None:
    write_events("run", {"train_loss": [1.0] * 20})
    command = f"{sys.executable} -m lightning_gradguard report run | true"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_help_shows_examples_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "lightning-gradguard report lightning_logs/version_0" in text
    assert all(option in text for option in ("RUN_DIR", "--html [FILE]", "--json [FILE]"))


def test_report_loads_neither_torch_nor_lightning() -> None:
    write_events("run", {"grad_norm/total": [1.0] * 20, "train_loss": [2.0 * 0.9**i for i in range(20)]})
    code = (
        "import sys; from lightning_gradguard.cli.main import main;"
        "main(['report', 'run']);"
        "assert not {'numpy', 'matplotlib', 'jinja2'} & set(sys.modules);"
        "main(['report', 'run', '--html', 'page.html']);"
        "heavy = {'torch', 'pytorch_lightning', 'lightning'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("run: healthy") == 2
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("arguments", [("runs", "--html"), ("--html", "runs")])
def test_a_page_without_a_name(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("bare", "guarded"):
        write_events(f"runs/{name}/version_0", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    report.main(arguments)
    text, written = capsys.readouterr()
    assert written == f"wrote {Path('report.html').absolute()}; open it in a browser\n"
    assert [line.split()[0] for line in text.splitlines()[1:3]] == ["bare", "guarded"]
    assert "Comparison" in Path("report.html").read_text()
    assert set(Path().iterdir()) == {Path("runs"), Path("report.html")}
