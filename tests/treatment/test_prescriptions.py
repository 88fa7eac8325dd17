"""Faults of code and data are prescribed with file and line."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.core.detectors.diagnosis import Symptom
from lightning_gradguard.core.incidents import Incident
from lightning_gradguard.treatment.patches import patched_call
from lightning_gradguard.treatment.prescriptions import Prescription, prescriptions
from tests.treatment.programs import Net


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sigmoid(self.first(x))
        out: Tensor = self.second(hidden)
        return out


class Still(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def line_of(one: Prescription) -> str:
    place, _, number = one.place.rpartition(":")
    assert place.endswith("test_prescriptions.py")
    return Path(__file__).read_text().splitlines()[int(number) - 1].strip()


def test_rate_of_zero_is_prescribed_at_the_optimizer() -> None:
    symptom = Symptom("weight_stagnation", "learning_rate_too_low", ("net",), 0.0, "it is 0", "stagnation")
    (one,) = prescriptions(Still(), [symptom], [], None)
    assert one.fault == "learning_rate_too_low"
    assert line_of(one) == "return torch.optim.SGD(self.parameters(), lr=0.0)"
    assert one.patch.endswith("+        return torch.optim.SGD(self.parameters(), lr=1e-3)")
    assert one.is_blocking


@pytest.mark.parametrize("is_partial", [False, True])
def test_rate_that_a_factor_raises_is_not_prescribed(is_partial: bool) -> None:
    """Where gradients vanish, a low rate moves some weights by less than others, and is no fault of code."""
    symptom = Symptom(
        "weight_stagnation",
        "learning_rate_too_low",
        ("net",),
        1e-9,
        "at most",
        "stagnation",
        is_partial=is_partial,
    )
    assert not prescriptions(Still(), [symptom], [], None)


def test_rows_with_nan_are_named() -> None:
    batch = torch.ones(4, 2)
    batch[2, 1] = torch.nan
    (one,) = prescriptions(Net(), [], [(torch.ones(4, 2), None), (batch, None)], None)
    assert one.fault == "bad_input"
    assert one.text.startswith(
        "Batch 1 of training has nonfinite values in row 2 of a tensor of shape (4, 2)"
    )


def test_function_is_prescribed_as_a_patch() -> None:
    net = Functional()
    symptom = Symptom("vanishing_gradient", "saturating_activations", ("first",), 4.0, "", "depth")
    (one,) = prescriptions(net, [symptom], [], lambda: net(torch.ones(8, 2)).sum())
    assert line_of(one) == "hidden = torch.sigmoid(self.first(x))"
    assert one.patch.splitlines()[-2:] == [
        "-        hidden = torch.sigmoid(self.first(x))",
        "+        hidden = torch.nn.functional.gelu(self.first(x))",
    ]


class Looped(nn.Module):
    """Layers on a graph, whose products no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.graph = torch.eye(8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(self.graph @ layer(x))
        return x


def test_residual_addition_without_a_place_is_prescribed_as_a_patch() -> None:
    net, symptom = Looped(), Symptom("vanishing_gradient", "depth", ("layers.0",), 4.0, "", "depth")
    (one,) = prescriptions(net, [symptom], [], lambda: net(torch.ones(8, 2)).sum())
    assert line_of(one) == "x = torch.relu(self.graph @ layer(x))"
    assert one.patch.endswith(
        "+            x = (new := torch.relu(self.graph @ layer(x))) + (x if x.shape == new.shape else 0)"
    )
    assert not one.is_blocking


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = [nn.Linear(2, 2) for _ in range(2)]
        self.head = nn.Linear(2, 1)


def test_list_of_modules_is_prescribed_as_a_module_list() -> None:
    symptom = Symptom("weight_stagnation", "not_registered", ("blocks.0",), 4.0, "", "stagnation")
    (one,) = prescriptions(Listed(), [symptom], [], None)
    assert line_of(one) == "self.blocks = [nn.Linear(2, 2) for _ in range(2)]"
    assert one.patch.endswith(
        "+        self.blocks = torch.nn.ModuleList([nn.Linear(2, 2) for _ in range(2)])"
    )


@pytest.mark.parametrize("file", ["model.py", "lightning_logs/own (1).py", "<ipython-input-3>"])
def test_operation_is_prescribed_at_the_location_of_its_incident(file: str) -> None:
    incident = Incident(
        "nonfinite_gradient",
        0,
        cause="backward_pass",
        advice="use torch.sqrt(x + 1e-6), as other.py:3 in forward does",
        location=f"{file}:12 in training_step",
    )
    (one,) = prescriptions(Net(), [], [], None, [incident])
    assert one.place == f"{file}:12"
    assert not prescriptions(Net(), [], [], None, [replace(incident, location="")])


@pytest.mark.parametrize(
    ("fault", "before", "after"),
    [
        ("softmax_before_loss", "F.softmax(self.net(x), dim=1)", "self.net(x)"),
        ("softmax_before_loss", "torch.nn.Softmax(1)", "torch.nn.Identity()"),
        ("softmax_before_loss", "F.cross_entropy(p, y)", ""),
        ("unreachable_targets", "torch.tanh(self.head(h))", "self.head(h)"),
        ("detached", "self.body(x).detach()", "self.body(x)"),
        ("not_log_probabilities", "F.nll_loss(z, y)", "F.cross_entropy(z, y)"),
        ("single_class", "nn.Softmax(dim=1)", "nn.Sigmoid()"),
        ("broadcast_targets", "F.mse_loss(z, y)", "F.mse_loss(z, y.view_as(z))"),
        ("not_in_optimizer", "SGD(self.head.parameters(), lr=0.1)", "SGD(self.parameters(), lr=0.1)"),
        ("constant_loss", "z.round()", ""),
    ],
)
def test_call_at_fault_is_replaced(fault: str, before: str, after: str) -> None:
    call = ast.parse(before, mode="eval").body
    assert isinstance(call, ast.Call)
    assert patched_call(fault, call) == after
