"""Messages are one line, and exceptions are traced to the user's own code."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_gradguard import NaNRollback
from lightning_gradguard.cli.messages import (
    UsageError,
    is_raised_by_suite,
    one_line,
    source_line,
    usage_errors_reported,
)


def test_usage_error_ends_with_code_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, usage_errors_reported("fit"):
        raise UsageError("wrong.")
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "lightning-gradguard fit: wrong.\n")


def test_long_message_is_cut() -> None:
    assert one_line("a " * 150) == "a " * 149 + "a"
    assert one_line("a" * 300) == "a" * 300
    assert one_line("a" * 301) == "a" * 297 + "..."


def test_source_line_is_the_innermost_of_the_user() -> None:
    Path("own.py").write_text("import json\n\ndef f(): json.loads('{')\n")
    namespace: dict[str, object] = {}
    exec(compile(Path("own.py").read_text(), str(Path.cwd() / "own.py"), "exec"), namespace)
    with pytest.raises(ValueError, match="Expecting") as raised:
        namespace["f"]()  # type: ignore[operator]
    assert source_line(raised.value) == " (own.py, line 3)"
    assert not is_raised_by_suite(raised.value)


def test_values_are_rejected_by_the_suite() -> None:
    with pytest.raises(ValueError, match="patience=0") as raised:
        NaNRollback(patience=0)
    assert is_raised_by_suite(raised.value)
