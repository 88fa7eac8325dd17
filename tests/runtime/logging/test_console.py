"""Messages go through the logger `lightning_gradguard`, which the usual calls of `logging` configure."""

from __future__ import annotations

import io
import logging
import sys
from typing import Any

import pytest

from lightning_gradguard import NaNRollback, default_callbacks
from tests.tasks import Classifier, batches, fit, poisoned

LOGGER = logging.getLogger("lightning_gradguard")
DATA = poisoned(batches(30), nan=[4, 17, 18, 19])


def printed(capsys: pytest.CaptureFixture[str], **arguments: Any) -> str:
    fit(Classifier(), DATA, default_callbacks(), **arguments)
    found = capsys.readouterr()
    return found.out + found.err


def test_interventions_are_warnings(caplog: pytest.LogCaptureFixture) -> None:
    fit(Classifier(), DATA, default_callbacks())
    levels = {r.getMessage().split(" at ")[0]: r.levelname for r in caplog.records if r.name == LOGGER.name}
    assert levels.pop("gradguard: Nonfinite loss") == "WARNING"
    assert levels.pop("gradguard: Rolled back to step 0") == "WARNING"
    assert {level for text, level in levels.items() if "Run summary" in text} == {"INFO"}


@pytest.mark.parametrize("bar", [False, True])
def test_lightnings_level_has_no_effect(bar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.CRITICAL)
    text = printed(capsys, enable_progress_bar=bar)
    assert text.count("gradguard: Rolled back to step 0") == 1
    assert text.count("gradguard: Run summary") == 1


@pytest.mark.parametrize("bar", [False, True])
def test_levels(bar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    LOGGER.setLevel(logging.WARNING)
    text = printed(capsys, enable_progress_bar=bar)
    assert "Rolled back" in text
    assert "Run summary" not in text
    LOGGER.setLevel(logging.ERROR)
    assert "gradguard" not in printed(capsys, enable_progress_bar=bar)
    LOGGER.setLevel(logging.INFO)
    logging.disable(logging.CRITICAL)
    assert "gradguard" not in printed(capsys, enable_progress_bar=bar)


def test_the_level_of_a_root_that_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """As after `logging.basicConfig(level=WARNING)`; a level of this logger comes first."""
    root, screen = logging.getLogger(), logging.StreamHandler(sys.stderr)
    root.addHandler(screen)
    before = root.level
    try:
        root.setLevel(logging.WARNING)
        text = printed(capsys)
        assert "Rolled back" in text
        assert "Run summary" not in text
        root.setLevel(logging.INFO)
        assert "Run summary" in printed(capsys)
        root.setLevel(logging.WARNING)
        LOGGER.setLevel(logging.INFO)
        assert "Run summary" in printed(capsys)
    finally:
        root.removeHandler(screen)
        root.setLevel(before)


def test_a_trainer_that_is_not_verbose_prints_interventions_alone(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = default_callbacks(nan_rollback=NaNRollback(patience=2), verbose=False)
    fit(Classifier(), DATA, quiet)
    text = "".join(capsys.readouterr())
    assert "Rolled back" in text
    assert "Run summary" not in text
    assert "Run summary" in printed(capsys)  # of another Trainer


@pytest.mark.parametrize("bar", [False, True])
def test_a_handler_of_the_users(bar: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Of this logger, it gets them too; one of the root that prints to the screen gets them instead."""
    own = logging.StreamHandler(io.StringIO())
    LOGGER.addHandler(own)
    try:
        assert "Rolled back" in printed(capsys, enable_progress_bar=bar)
        assert "Rolled back" in own.stream.getvalue()
    finally:
        LOGGER.removeHandler(own)
    screen = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(screen)
    try:
        assert printed(capsys, enable_progress_bar=bar).count("gradguard: Rolled back to step 0") == 1
    finally:
        logging.getLogger().removeHandler(screen)
