"""Options are found among flags and in files, without a parser."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_gradguard.cli.parsing.preparse import find_option, named_class
from tests.cli.conftest import QUIET, Command, saved

pytestmark = pytest.mark.filterwarnings("ignore:\\s*skip_none parameter was deprecated")


def test_last_file_names_the_module(mine: Path, command: Command) -> None:
    Path("first.yaml").write_text("model: mine.Net\n")
    Path("last.yaml").write_text("model: mine.Own\n")
    sys.path.insert(0, str(mine))
    files = ("-c", "first.yaml", "--config", "last.yaml")
    assert named_class(files).__name__ == "Own"
    assert named_class([*files, "--model=mine.Saves"]).__name__ == "Saves"
    assert command("fit", *files, *QUIET)[0] == 0
    assert saved()["model"]["class_path"] == "mine.Own"


@pytest.mark.parametrize("arguments", [(), ("--model", "mine"), ("--model",), ("-c", "none.yaml")])
def test_named_class_is_none_if_it_cannot_be_imported(arguments: tuple[str, ...]) -> None:
    assert named_class(arguments) is None


def test_flags_override_files() -> None:
    arguments = ("--model.init_args.width=3", "--trainer.callbacks+=A", "--trainer.max_steps", "5")
    contents = {"a.yaml": {"model": {"init_args": {"width": 4, "depth": 2}}}, "b.yaml": {"data": "mine.Data"}}
    assert find_option(arguments, contents, "model.width") == ("--model.width", "3")
    assert find_option(arguments, contents, "trainer.callbacks") == ("--trainer.callbacks", "A")
    assert find_option(arguments, contents, "trainer.max_steps") == ("--trainer.max_steps", "5")
    assert find_option(arguments, contents, "model.depth") == ("a.yaml: model.depth", 2)
    assert find_option(arguments, contents, "data") == ("b.yaml: data", "mine.Data")
    assert find_option(arguments, contents, "optimizer") == ("--optimizer", "")
