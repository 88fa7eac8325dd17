"""Names of parameters, and patterns that select them."""

from __future__ import annotations

import ast
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradientNormMonitor,
    InitializationCheck,
    default_callbacks,
)
from lightning_gradguard.core.parameter_names import code_of, warn_unknown, warn_unmatched
from lightning_gradguard.runtime.lightning_api import Callback
from tests.tasks import Classifier, batches, fit


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(2, 2)
        self.head.bias.requires_grad_(False)


class Odd(nn.Module):
    """Children and parameters under all kinds of names, those of a slice among them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Sequential(*map(nn.Linear, [2] * 4, [2] * 4))[2:], nn.ReLU())
        self.heads = nn.ModuleDict({"a-b": nn.Linear(2, 2), "0": nn.ModuleList([nn.Linear(2, 2)])})
        self.heads["relu"] = nn.Sequential(OrderedDict({"two words": nn.PReLU(), "plain": nn.PReLU()}))
        self.scales = nn.ParameterDict({"x-y": nn.Parameter(torch.ones(1))})
        self.lengths = nn.ParameterList([nn.Parameter(torch.ones(1))])
        for name in ("for", "7", "it's"):
            self.add_module(name, nn.Linear(2, 2))


def test_code_of_a_name_is_an_expression() -> None:
    model = Odd()
    for name, expected in (*model.named_modules(), *model.named_parameters()):
        code = code_of(name, model)
        assert eval(code, {"model": model}) is expected, code


def test_code_of_a_name_of_no_known_model_is_an_expression_on_it() -> None:
    model = Headed()
    model.add_module("two-fold", nn.Sequential(nn.Linear(2, 2)))
    for name, expected in (*model.named_modules(), *model.named_parameters()):
        assert eval(code_of(name), {"model": model}) is expected
    for name in ("batch[0]", "train.py:7 in training_step", "parameter.6", "body.9"):
        assert isinstance(ast.parse(code_of(name, model)), ast.Module)


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
    assert message.startswith(f"exclude: {pattern!r} matches nothing in the module. Did you mean ")
    assert nearest.partition(".")[0] in message.partition("Did you mean")[2]


def test_no_name_is_suggested_that_is_not_near() -> None:
    with pytest.warns(UserWarning, match=r"exclude: 'head' matches nothing in the module\.$"):
        warn_unknown("exclude", ["head"], ["body.0.weight"])


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
    with pytest.warns(UserWarning, match=f"{argument}: 'nett.0' .* Did you mean net.0") as caught:
        fit(module, batches(3), [callback], max_epochs=2)
    assert len([warning for warning in caught if "matches nothing" in str(warning.message)]) == 1


def test_the_default_suite_does_not_warn() -> None:
    fit(Classifier(), batches(3), default_callbacks())
