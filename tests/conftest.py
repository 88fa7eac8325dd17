"""What every test stands on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# the same examples in every run: a failure on CI is a failure here
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, a seed, an empty folder to write to, and no chatter."""
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
