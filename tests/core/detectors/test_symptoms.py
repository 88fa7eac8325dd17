"""Symptoms are detected once an episode, and never in healthy training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from lightning_gradguard.core.detectors import Symptom, SymptomDetector
from lightning_gradguard.core.norms import measure_gradients, tensor_norms


def train(
    network: nn.Sequential, optimizer: torch.optim.Optimizer, steps: int, warmup: int = 0
) -> list[Symptom]:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(20, 4, generator=generator)
    detector, symptoms = SymptomDetector(), []
    lr = optimizer.param_groups[0]["lr"]
    for step in range(steps):
        inputs = torch.randn(64, 20, generator=generator)
        loss = nn.functional.cross_entropy(network(inputs), (inputs @ teacher).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / max(warmup, 1))
        gradients = measure_gradients(network.named_parameters())
        before = [parameter.detach().clone() for parameter in gradients.parameters]
        weights = tensor_norms(before)
        optimizer.step()
        after = [parameter.detach() for parameter in gradients.parameters]
        moved = tensor_norms([a - b for a, b in zip(after, before, strict=True)])
        if step % 5 == 0:
            symptoms += detector.update(
                step,
                names=gradients.names,
                is_matrix=[parameter.ndim > 1 for parameter in gradients.parameters],
                grad_norms=gradients.norms.tolist(),
                weight_norms=weights.tolist(),
                update_ratios=(moved / weights).tolist(),
                total_norm=float(gradients.total_norm),
                loss=float(loss.detach()),
                nonfinite_fraction=0.0,
            )
    return symptoms


def mlp(depth: int, activation: type[nn.Module], gain: float | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i in range(depth):
        linear = nn.Linear(20 if i == 0 else 32, 32)
        if gain is not None:
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, activation()]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def test_healthy_training_has_no_symptoms() -> None:
    for depth, warmup in ((2, 0), (6, 50), (10, 0)):
        network = mlp(depth, nn.ReLU, gain=2.0)
        assert train(network, torch.optim.Adam(network.parameters(), 1e-3), 300, warmup) == []
    network = mlp(3, nn.ReLU, gain=2.0)
    assert train(network, torch.optim.SGD(network.parameters(), 0.05, momentum=0.9), 800) == []


def test_deep_sigmoid_network_has_vanishing_gradients_in_its_first_layers() -> None:
    network = mlp(20, nn.Sigmoid)
    symptoms = train(network, torch.optim.SGD(network.parameters(), 0.01), 200)
    kinds = {symptom.kind: symptom for symptom in symptoms}
    assert kinds["vanishing_gradient"].where[0] == "0.weight"
    assert kinds["vanishing_gradient"].value > 3
    assert "weight_stagnation" in kinds
    assert [s.kind for s in symptoms].count("vanishing_gradient") == 1


def check(detector: SymptomDetector, step: int, **facts: object) -> list[Symptom]:
    known: dict[str, object] = {
        "names": ["a", "b"],
        "is_matrix": [True, True],
        "grad_norms": [1.0, 2.0],
        "weight_norms": [1.0, 1.0],
        "update_ratios": [1e-3, 1e-3],
        "total_norm": 2.0,
        "loss": 1.0 + 1.0 / (1 + step),
        "nonfinite_fraction": 0.0,
    }
    return detector.update(step, **{**known, **facts})  # type: ignore[arg-type]


def test_explosion_names_the_largest_gradient_once() -> None:
    detector = SymptomDetector()
    alarms: Sequence[Symptom] = []
    for step in range(200):
        alarms = [*alarms, *check(detector, step)]
    for step in range(200, 210):
        alarms = [*alarms, *check(detector, step, total_norm=1e5, grad_norms=[1.0, 1e5])]
    assert [(a.kind, a.where[0]) for a in alarms] == [("exploding_gradient", "b")]


def test_nonfinite_gradient_is_detected_at_once() -> None:
    detector = SymptomDetector()
    (symptom,) = check(detector, 0, nonfinite_fraction=0.5, grad_norms=[1.0, math.nan], total_norm=math.nan)
    assert symptom == Symptom("nonfinite_gradient", ("b",), 0.5)


@pytest.mark.parametrize("resumed", [False, True])
def test_explosion_right_before_nan_is_detected_in_the_warmup(resumed: bool) -> None:
    detector = SymptomDetector()
    for step in range(3):
        assert check(detector, step) == []
    assert check(detector, 3, total_norm=1e6, grad_norms=[1.0, 1e6]) == []
    if resumed:
        state = detector.state_dict()
        detector = SymptomDetector()
        detector.load_state_dict(state)
    first, second = check(detector, 4, total_norm=math.nan, nonfinite_fraction=1.0)
    assert (first.kind, first.where[0], first.value) == ("exploding_gradient", "b", 1e6)
    assert second.kind == "nonfinite_gradient"


def test_early_explosion_that_passes_is_not_detected() -> None:
    detector = SymptomDetector()
    for step in range(3):
        check(detector, step)
    check(detector, 3, total_norm=1e6)
    check(detector, 4)
    (only,) = check(detector, 5, total_norm=math.nan, nonfinite_fraction=1.0)
    assert only.kind == "nonfinite_gradient"


def test_stuck_loss_needs_unchanged_weights_and_a_flat_loss() -> None:
    still, flat = {"update_ratios": [0.0, 0.0]}, {"loss": 2.0}
    for facts, expected in ((flat, set()), ({**still, **flat}, {"weight_stagnation", "stuck_loss"})):
        detector = SymptomDetector()
        kinds = {s.kind for step in range(0, 1000, 5) for s in check(detector, step, **facts)}
        assert kinds == expected


def test_resumed_detector_gives_the_same_symptoms() -> None:
    detector, resumed = SymptomDetector(), SymptomDetector()
    for step in range(300):
        check(detector, step)
    check(detector, 300, total_norm=1e5)
    resumed.load_state_dict(detector.state_dict())
    alarm = check(resumed, 301, total_norm=1e5)
    assert alarm == check(detector, 301, total_norm=1e5)
    assert alarm[0].kind == "exploding_gradient"
