"""Names of parameters, and patterns that select them."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradientNormMonitor,
    InitializationCheck,
    default_callbacks,
)
from lightning_gradguard.core.parameter_names import warn_unknown, warn_unmatched
from lightning_gradguard.runtime.lightning_api import Callback
from tests.tasks import Classifier, batches, fit


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(2, 2)
        self.head.bias.requires_grad_(False)


def warned(*patterns: str) -> list[str]:
    module = Headed()
    optimizer = torch.optim.SGD([*module.parameters(), nn.Parameter(torch.zeros(2))])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_unmatched("exclude", patterns, module, [optimizer])
    return [str(warning.message) for warning in caught]


def test_patterns_that_match_do_not_warn() -> None:
    """Also parameters without a gradient, and those that the module does not hold."""
    assert warned("head", "body.0", "body.*.bias", "head.bias", "parameter.6") == []


@pytest.mark.parametrize(
    ("pattern", "nearest"),
    [
        ("haed", "head"),
        ("body.0.wieght", "body.0.weight"),
        ("bdy.*", "body.1"),
        ("head.weights", "head.weight"),
    ],
)
def test_an_unmatched_pattern_warns_with_the_nearest_name(pattern: str, nearest: str) -> None:
    (message,) = warned("head", pattern)
    assert message.startswith(f"exclude: {pattern!r} matches nothing in the module. Did you mean '")
    assert nearest.partition(".")[0] in message.partition("Did you mean")[2]


def test_no_name_is_near_in_an_empty_module() -> None:
    with pytest.warns(UserWarning, match=r"exclude: 'head' matches nothing in the module\.$"):
        warn_unknown("exclude", ["head"], [])


@pytest.mark.parametrize(
    ("callback", "argument"),
    [
        (GradientNormMonitor(include=["nett.0", "net.0"]), "include"),
        (GradientNormMonitor(exclude=["nett.0"]), "exclude"),
        (AdaptiveGradientClipping(exclude=["nett.0"]), "exclude"),
        (InitializationCheck(repair_modules=["nett.0"]), "repair_modules"),
    ],
    ids=["include", "exclude", "clipping", "repair_modules"],
)
def test_a_fit_warns_once(callback: Callback, argument: str) -> None:
    module = Classifier()
    with pytest.warns(UserWarning, match=f"{argument}: 'nett.0' .* Did you mean 'net.0'") as caught:
        fit(module, batches(3), [callback], max_epochs=2)
    assert len([warning for warning in caught if "matches nothing" in str(warning.message)]) == 1


def test_the_default_suite_does_not_warn() -> None:
    fit(Classifier(), batches(3), default_callbacks())
