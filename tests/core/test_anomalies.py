"""Detectors speak when something is wrong, once, and never on healthy training."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_gradguard.core.detectors import (
    Persistence,
    SpikeDetector,
    Symptom,
    SymptomDetector,
    depth_profile,
)
from lightning_gradguard.core.norms import measure_gradients, tensor_norms


def test_spikes_of_ten_times_are_found_and_noise_is_not() -> None:
    generator = random.Random(0)
    detector = SpikeDetector()
    false_alarms = sum(detector.update(generator.lognormvariate(0, 0.2)) for _ in range(10_000))
    assert false_alarms == 0
    hits = 0
    for _ in range(100):
        for _ in range(20):
            detector.update(generator.lognormvariate(0, 0.2))
        hits += detector.update(10 * generator.lognormvariate(0, 0.2))
    assert hits == 100


def test_correlated_noise_gives_few_alarms() -> None:
    generator = random.Random(1)
    detector, level, alarms = SpikeDetector(), 0.0, 0
    for _ in range(10_000):
        level = 0.9 * level + generator.gauss(0, 0.4 * math.sqrt(1 - 0.81))
        alarms += detector.update(math.exp(level))
    assert alarms <= 20


def test_a_lasting_spike_keeps_being_one_for_its_patience() -> None:
    detector = SpikeDetector()
    assert not any(detector.update(1.0) for _ in range(100))
    assert all(detector.update(50.0) for _ in range(10))


def test_a_level_that_changed_for_good_is_followed() -> None:
    generator = random.Random(2)
    detector = SpikeDetector()
    for _ in range(200):
        detector.update(generator.lognormvariate(0, 0.2))
    after = [detector.update(5 * generator.lognormvariate(0, 0.2)) for _ in range(400)]
    assert any(after[:10])
    assert not any(after[150:])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([math.nan, math.inf, -1.0, 0.0, None]), min_size=60, max_size=120))
def test_nonfinite_values_change_no_verdict(stream: list[float | None]) -> None:
    generator = random.Random(3)
    with_bad, without = SpikeDetector(min_history=8), SpikeDetector(min_history=8)
    for bad in stream:
        if bad is not None:
            assert not with_bad.update(bad)
        value = generator.lognormvariate(0, 1.5)
        assert with_bad.update(value) is without.update(value)


def test_a_resumed_detector_decides_alike() -> None:
    generator = random.Random(4)
    values = [generator.lognormvariate(0, 0.5) * (100 if i % 37 == 36 else 1) for i in range(400)]
    whole, first, resumed = SpikeDetector(), SpikeDetector(), SpikeDetector()
    expected = [whole.update(value) for value in values]
    for value in values[:150]:
        first.update(value)
    resumed.load_state_dict(first.state_dict())
    assert [resumed.update(value) for value in values[150:]] == expected[150:]
    assert any(expected[150:])


def test_one_alarm_an_episode() -> None:
    persistence = Persistence(steps=4, checks=2)
    holds = [True] * 8 + [False] * 6 + [True] * 6
    alarms = [persistence.update(step, hold) for step, hold in enumerate(holds)]
    assert [step for step, alarm in enumerate(alarms) if alarm] == [4, 18]


def test_a_flicker_is_no_episode() -> None:
    persistence = Persistence(steps=2, checks=2)
    assert not any(persistence.update(step, step % 2 == 0) for step in range(50))


@pytest.mark.parametrize(
    ("grads", "expected"),
    [
        ([1e-6, 1e-4, 1e-2, 1.0], 6.0),
        ([1.0, 1e-2, 1e-4, 1e-6], -6.0),
        ([1.0] * 10, 0.0),
        ([1.0] * 3, 0.0),
        ([math.nan, 1.0, 1.0, 1.0], 0.0),
        ([0.0, 0.0, 1.0, 1.0, 1.0], math.inf),
        ([0.0] * 5, 0.0),
    ],
)
def test_depth_profile(grads: list[float], expected: float) -> None:
    assert depth_profile(grads, [1.0] * len(grads)) == pytest.approx(expected)


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


def test_healthy_training_is_silent() -> None:
    for depth, warmup in ((2, 0), (6, 50), (10, 0)):
        network = mlp(depth, nn.ReLU, gain=2.0)
        assert train(network, torch.optim.Adam(network.parameters(), 1e-3), 300, warmup) == []
    network = mlp(3, nn.ReLU, gain=2.0)
    assert train(network, torch.optim.SGD(network.parameters(), 0.05, momentum=0.9), 800) == []


def test_a_deep_sigmoid_network_vanishes_in_its_first_layers() -> None:
    network = mlp(20, nn.Sigmoid)
    symptoms = train(network, torch.optim.SGD(network.parameters(), 0.01), 200)
    kinds = {symptom.kind: symptom for symptom in symptoms}
    assert kinds["vanishing_gradient"].where[0] == "0.weight"
    assert kinds["vanishing_gradient"].value > 3
    assert "weight_stagnation" in kinds
    assert [s.kind for s in symptoms].count("vanishing_gradient") == 1


def look(detector: SymptomDetector, step: int, **facts: object) -> list[Symptom]:
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


def test_an_explosion_names_the_largest_gradient_once() -> None:
    detector = SymptomDetector()
    alarms: Sequence[Symptom] = []
    for step in range(200):
        alarms = [*alarms, *look(detector, step)]
    for step in range(200, 210):
        alarms = [*alarms, *look(detector, step, total_norm=1e5, grad_norms=[1.0, 1e5])]
    assert [(a.kind, a.where[0]) for a in alarms] == [("exploding_gradient", "b")]


def test_a_nonfinite_gradient_is_told_at_once() -> None:
    detector = SymptomDetector()
    (symptom,) = look(detector, 0, nonfinite_fraction=0.5, grad_norms=[1.0, math.nan], total_norm=math.nan)
    assert symptom == Symptom("nonfinite_gradient", ("b",), 0.5)


@pytest.mark.parametrize("resumed", [False, True])
def test_an_explosion_right_before_nan_is_told_however_early(resumed: bool) -> None:
    detector = SymptomDetector()
    for step in range(3):
        assert look(detector, step) == []
    assert look(detector, 3, total_norm=1e6, grad_norms=[1.0, 1e6]) == []
    if resumed:
        state = detector.state_dict()
        detector = SymptomDetector()
        detector.load_state_dict(state)
    first, second = look(detector, 4, total_norm=math.nan, nonfinite_fraction=1.0)
    assert (first.kind, first.where[0], first.value) == ("exploding_gradient", "b", 1e6)
    assert second.kind == "nonfinite_gradient"


def test_an_early_explosion_that_passes_is_not_told() -> None:
    detector = SymptomDetector()
    for step in range(3):
        look(detector, step)
    look(detector, 3, total_norm=1e6)
    look(detector, 4)
    (only,) = look(detector, 5, total_norm=math.nan, nonfinite_fraction=1.0)
    assert only.kind == "nonfinite_gradient"


def test_stuck_needs_still_weights_and_flat_loss() -> None:
    still, flat = {"update_ratios": [0.0, 0.0]}, {"loss": 2.0}
    for facts, expected in ((flat, set()), ({**still, **flat}, {"weight_stagnation", "stuck_loss"})):
        detector = SymptomDetector()
        kinds = {s.kind for step in range(0, 1000, 5) for s in look(detector, step, **facts)}
        assert kinds == expected


def test_a_resumed_symptom_detector_decides_alike() -> None:
    detector, resumed = SymptomDetector(), SymptomDetector()
    for step in range(300):
        look(detector, step)
    look(detector, 300, total_norm=1e5)
    resumed.load_state_dict(detector.state_dict())
    alarm = look(resumed, 301, total_norm=1e5)
    assert alarm == look(detector, 301, total_norm=1e5)
    assert alarm[0].kind == "exploding_gradient"
