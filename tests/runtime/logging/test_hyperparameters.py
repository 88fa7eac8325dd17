"""Arguments of callbacks are logged as hyperparameters, in a line each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_gradguard import AdaptiveGradientClipping, GradientNormMonitor, NaNRollback, PercentileClipping
from lightning_gradguard.runtime.logging.hyperparameters import hyperparameters_of, non_defaults


class Passing(GradientNormMonitor):
    """Hands everything on."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)


class Odd(GradientNormMonitor):
    """Takes anything."""

    def __init__(self, thing: Any = None) -> None:
        super().__init__()
        self.settings = non_defaults(Odd, locals())


def test_arguments_of_a_subclass_are_logged() -> None:
    assert hyperparameters_of([Passing(level="total")]) == {"callbacks": "Passing", "Passing.level": "total"}


@pytest.mark.parametrize(
    "thing",
    [
        {"a": 1},
        {1, 2},
        torch.device("cpu"),
        torch.ones(3),
        np.ones(3),
        Path("x"),
        np.int64(3),
        nn.Linear(2, 2),
        len,
    ],
)
def test_any_value_is_one_line(thing: Any) -> None:
    told = hyperparameters_of([Odd(thing)])["Odd.thing"]
    assert isinstance(told, str)
    assert 0 < len(told) <= 200
    assert "\n" not in told


def test_defaults_are_omitted_and_two_of_a_kind_are_distinguished() -> None:
    first, second = NaNRollback(patience=3), NaNRollback(patience=5)
    clipping = AdaptiveGradientClipping(PercentileClipping(20.0))
    assert hyperparameters_of([first, second, clipping]) == {
        "callbacks": "NaNRollback, NaNRollback, AdaptiveGradientClipping",
        "NaNRollback 2.patience": 5,
        "AdaptiveGradientClipping.policy": "PercentileClipping(percentile=20.0, window=1000)",
    }
