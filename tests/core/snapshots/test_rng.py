"""Random number generators are read without initializing CUDA, and where steps draw from them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lightning_gradguard.core.snapshots import StepRandomness, rng_state, set_rng_state


def test_generators_of_an_unused_gpu_are_omitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask for them would set up CUDA, and processes that are forked later could not use it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("CUDA was set up"))
    set_rng_state(rng_state())


@pytest.mark.parametrize("draw", [random.random, np.random.normal, lambda: np.random.permutation(3)])
def test_a_step_that_draws_on_the_host_is_run_again_with_its_numbers(draw: Callable[[], Any]) -> None:
    randomness = StepRandomness()
    for _ in range(3):
        state = randomness.before_step()
        drawn = np.append(draw(), torch.rand(()))
        if randomness.is_probing:
            randomness.after_step()
    assert randomness.draws_on_host
    set_rng_state(state)
    assert np.array_equal(np.append(draw(), torch.rand(())), drawn)


def test_a_step_that_begins_to_draw_on_the_host_is_noticed_when_probed() -> None:
    randomness = StepRandomness()

    def state_of_step(draws: bool) -> set[str]:
        state = randomness.before_step()
        if draws:
            random.random()
        if randomness.is_probing:
            randomness.after_step()
        return {*state}

    for _ in range(StepRandomness.PROBED):
        assert state_of_step(draws=False) == {"torch", "cuda", "numpy", "python"}
    assert state_of_step(draws=True) == {"torch", "cuda"}
    randomness.probe_next_step()
    state_of_step(draws=True)
    assert state_of_step(draws=True) == {"torch", "cuda", "numpy", "python"}
