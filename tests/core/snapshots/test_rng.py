"""Random number generators are read without initializing CUDA."""

from __future__ import annotations

import pytest
import torch

from lightning_gradguard.core.snapshots import rng_state, set_rng_state


def test_generators_of_an_unused_gpu_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for them would set up CUDA, and processes that are forked later could not use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("CUDA was set up"))
    set_rng_state(rng_state())
