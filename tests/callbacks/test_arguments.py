"""Every argument of every callback and policy: what is no value for it is a `ValueError` that quotes it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import lightning_gradguard
from lightning_gradguard.callbacks.defaults import DEFAULTS
from lightning_gradguard.core.backoff import Backoff

POLICIES = [
    lightning_gradguard.GlobalNormClipping,
    lightning_gradguard.ZScoreClipping,
    lightning_gradguard.PercentileClipping,
    lightning_gradguard.UnitwiseClipping,
    lightning_gradguard.PerTensorClipping,
]
CLASSES: list[Any] = [*DEFAULTS.values(), *POLICIES, Backoff]
WRONG: list[Any] = ["two", b"2", 2.5, True, [1], {}, float("nan"), -1]


def is_right(name: str, default: Any, value: Any) -> bool:
    """True where a value that is wrong for most arguments is right: a number, a flag, a path, no names."""
    return (
        (value == 2.5 and (isinstance(default, float) or name == "max_norm"))
        or (value is True and isinstance(default, bool))
        or (value == "two" and name == "incident_dir")
        or (value == {} and name in ("include", "exclude", "repair_modules", "symptoms"))
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_wrong_arguments_are_quoted(kind: Any) -> None:
    for name, parameter in inspect.signature(kind).parameters.items():
        for wrong in WRONG:
            if not is_right(name, parameter.default, wrong):
                with pytest.raises(ValueError, match=f"{name}=") as raised:
                    kind(**{name: wrong})
                assert repr(wrong) in str(raised.value)


def test_a_loss_that_is_no_tensor() -> None:
    network = torch.nn.Linear(2, 1)
    guard = lightning_gradguard.TrainingGuard(network, torch.optim.SGD(network.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="loss=1.0 is a float, and no tensor: pass the loss"):
        guard.step(1.0)  # type: ignore[arg-type]
