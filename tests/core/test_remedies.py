"""Every kind of incident has advice."""

from __future__ import annotations

import re
from math import nan
from typing import Any, get_args

import pytest
import torch
from torch import nn

from lightning_gradguard.core.detectors.diagnosis import Symptom
from lightning_gradguard.core.incidents import CAUSES, KINDS, SYMPTOM_CAUSES, Incident, IncidentKind
from lightning_gradguard.core.remedies import Present, advice, advice_for_cause, advice_for_symptom, remedies
from lightning_gradguard.core.remedies.gates import gated_code
from tests.core.initialization.networks import fails, mlp


def symptom(cause: Any, where: tuple[str, ...], **known: Any) -> Symptom:
    return Symptom("vanishing_gradient", cause, where, nan, "", "depth", **known)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_advice(kind: str) -> None:
    assert advice(kind, ["layer.7"]).endswith(".")
    assert "{" not in advice(kind)


@pytest.mark.parametrize(
    ("kind", "remedies"),
    [
        ("vanishing_gradient", ["non-saturating", "He", "residual", "normalization", "LSTM", "layer-wise"]),
        ("exploding_gradient", ["clip", "learning rate", "orthogonal", "max-norm", "truncated BPTT"]),
    ],
)
def test_advice_names_the_standard_remedies(kind: str, remedies: list[str]) -> None:
    text = advice(kind, ["rnn.weight_hh_l0"])
    assert all(remedy in text for remedy in remedies)
    assert "rnn.weight_hh_l0" in text


def test_unknown_kind_has_no_advice() -> None:
    assert advice("coffee_machine_empty") == ""


@pytest.mark.parametrize("kind", KINDS)
def test_advice_leaves_away_what_is_there(kind: str) -> None:
    present: list[Present] = [*get_args(Present)]
    text = " ".join((advice(kind, ["head"], present), *remedies(kind, ["head"], present)))
    text = text.replace("NaNRollback(skip_invalid_batches=True)", "an argument of what is there")
    for there in (
        "AdaptiveGradientClipping",
        "LearningRateBackoff",
        "NaNRollback",
        "LSTM",
        "recurrent",
        "Add residual",
    ):
        assert there not in text
    assert "InitializationCheck()" not in text
    assert "clip gradients" not in text.lower()
    assert not re.search(r"[\[\]|]|  |,[.;,]|;[.,]| [.,;]", text), text


def test_code_in_advice_is_that_of_the_model() -> None:
    model = nn.ModuleDict({"0": nn.Linear(2, 2)})
    assert "model['0'].requires_grad_" in advice_for_cause("never_stepped", ["0"], model=model)
    assert "model[0].requires_grad_" in advice_for_cause("never_stepped", ["0"])


@pytest.mark.parametrize(
    ("cause", "activation", "std"),
    [
        ("small_weights", nn.Tanh, 0.05),
        ("large_weights", nn.ReLU, 0.9),
        ("saturating_activations", nn.ReLU, 0.05),
    ],
)
def test_pasted_advice_against_depth_mends_all_layers(
    cause: str, activation: type[nn.Module], std: float
) -> None:
    model = mlp(15, activation, initialize=lambda weight: nn.init.normal_(weight, std=std))
    assert fails(model)
    (code,) = re.findall(r"\[torch.*?\]", advice_for_cause(cause, ["0"], model=model))
    exec(code, {"torch": torch, "model": model})
    assert fails(model) == []


def test_advice_on_time_is_that_of_the_symptom() -> None:
    vanishing, exploding = (
        advice_for_cause("through_time", ["rnn"], kind=kind)
        for kind in ("vanishing_gradient", "exploding_gradient")
    )
    assert "use an LSTM for rnn" in vanishing
    assert "Clip gradients" in exploding
    assert "Clip" not in vanishing
    assert "LSTM" not in exploding


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_gates_that_keep_a_state_are_advised_as_code(kind: Any) -> None:
    """As `InitializationCheck` prints it, where the length of the sequences is known."""
    model: Any = nn.Sequential(kind(4, 8, batch_first=True))
    code = gated_code("model[0]", model[0], 80)
    found = advice_for_symptom(symptom("through_time", ("0",), n_times=80), (), model)
    assert found.endswith(f"with model = self:\n{code}")
    exec(code, {"nn": nn, "model": model})
    assert isinstance(model[0], nn.LSTM)
    assert model.get_parameter("0.bias_hh_l0")[8:16].tolist() == pytest.approx([4.4] * 8)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_pasted_packing_reads_the_state_before_the_padding(
    kind: Any, bidirectional: bool, batch_first: bool
) -> None:
    model: Any = nn.Sequential(kind(4, 8, batch_first=batch_first, bidirectional=bidirectional))
    words, _, code = advice_for_symptom(symptom("padding", ("0",)), (), model).rpartition("\n")
    assert words.endswith("with model = self and x for what model[0] gets:")
    short = torch.randn(2, 5, 4)
    x = torch.cat([short, torch.zeros(2, 9, 4)], 1)
    values: Any = {"nn": nn, "torch": torch, "model": model, "x": x if batch_first else x.transpose(0, 1)}
    exec(code, values)
    hidden = model[0](short if batch_first else short.transpose(0, 1))[1]
    hidden = hidden[0] if kind is nn.LSTM else hidden
    expected = torch.cat([hidden[-2], hidden[-1]], -1) if bidirectional else hidden[-1]
    torch.testing.assert_close(values["state"], expected)


@pytest.mark.parametrize("cause", [*CAUSES, *SYMPTOM_CAUSES])
def test_every_cause_but_an_unknown_one_has_advice(cause: str) -> None:
    text = advice_for_cause(cause, ["head"], ["clipping"])
    assert bool(text) is (cause != "unknown")
    assert "AdaptiveGradientClipping" not in text
    assert "[clipping" not in text


def test_pasted_advice_against_depth_mends_convolutions() -> None:
    torch.manual_seed(0)
    layers = [x for _ in range(12) for x in (nn.Conv2d(8, 8, 3, padding=1), nn.Tanh())]
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3, padding=1), *layers, nn.Flatten(), nn.Linear(512, 10)
    )
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)
    assert fails(model)
    (code,) = re.findall(r"\[torch.*?\]", advice_for_cause("small_weights", ["1"], model=model))
    exec(code, {"torch": torch, "model": model})
    assert fails(model) == []


def test_pasted_advice_against_depth_mends_matrices_of_functional_code_and_recurrences() -> None:
    model = nn.ModuleDict(
        {"own": nn.ParameterList([torch.zeros(8, 8)]), "rnn": nn.LSTM(4, 4, 2), "head": nn.Linear(8, 2)}
    )
    for where in ("own.0", "rnn"):
        (code,) = re.findall(r"\[torch.*?\]", advice_for_cause("small_weights", [where], model=model))
        nn.init.zeros_(model["own"][0])  # type: ignore[index]
        exec(code, {"torch": torch, "model": model})
        assert all(p.std() > 0 for p in model.parameters() if p.ndim > 1)
    assert "'params': [model['own'][0]]}" in advice_for_cause("not_in_optimizer", ["own.0"], model=model)


@pytest.mark.parametrize("kind", ["vanishing_gradient", "exploding_gradient"])
@pytest.mark.parametrize("value", [7.0, -7.0])
def test_one_incident_has_one_usual_value(kind: IncidentKind, value: float) -> None:
    detail = "Since step 1: the gradient of rnn shrinks by 7.0 decades (usual: below 2)."
    incident = Incident(kind, 2, 0, None, ("rnn",), value, cause="through_time", detail=detail)
    assert incident.describe().count("usual") == 1
    assert "last layer" not in incident.describe()


def test_pasted_small_steps_are_those_of_the_last_layer_in_a_loop() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(8, 1))

    def advised(*where: str) -> str:
        return advice_for_cause("through_time", where, ["clipping"], model, "exploding_gradient", 50)

    words, _, code = advised("0", "2").rpartition("\n")
    assert "state + 0.2 * f(state)" in words
    exec(code, {"torch": torch, "model": model})
    assert not any(p.any() for p in model[2].parameters())
    assert all(p.any() for p in model[0].parameters())
    assert advised("0", "3").startswith("Use Adam")  # of a policy
    assert "orthogonal" not in advised("0", "3")


def test_advice_on_depth_names_nothing_that_is_there() -> None:
    of_depth = symptom("depth", ("embed",))
    late = advice_for_symptom(of_depth, ["residual", "check"])
    assert late.startswith("Lower the learning rate, or warm it up for longer")
    assert not re.search("residual|InitializationCheck", late)
    early = advice_for_symptom(of_depth, ["untrained"])
    assert early.startswith("Use residual connections")
    assert "InitializationCheck" in early
    assert advice_for_symptom(of_depth, ["untrained", "residual", "check"])


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, "nn.init.zeros_(model[2].weight)"), (9.0, "normal_(model[2].weight, 0, 16 ** -0.5)")],
)
def test_a_head_is_not_initialized_larger_than_it_is(scale: float, expected: str) -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), head := nn.Linear(16, 1))
    nn.init.constant_(head.weight, scale / 4)
    assert expected in advice_for_cause("large_answers", ["2"], model=net)


@pytest.mark.parametrize(
    ("recurrent", "weight"),
    [(nn.RNN(4, 4), "weight_hh_l0"), (nn.RNNCell(4, 4), "weight_hh"), (nn.Linear(4, 4), "weight")],
)
def test_pasted_orthogonal_weight_is_that_of_the_module(recurrent: nn.Module, weight: str) -> None:
    model = nn.ModuleDict({"cell": recurrent})
    text = advice_for_cause("through_time", ["cell"], model=model)
    code = text[text.index("nn.init") : text.index(",", text.index("nn.init"))]
    exec(code, {"nn": nn, "model": model})
    found = getattr(recurrent, weight)
    assert torch.allclose(found.T @ found, torch.eye(4), atol=1e-5)
    again = advice_for_cause("through_time", ["cell"], model=model)
    assert "orthogonal" not in again
    assert "Use gated cells or truncated BPTT" in again


@pytest.mark.parametrize(("n_inputs", "are_waves_advised"), [(1, True), (20, False)])
def test_coordinates_are_given_as_waves(n_inputs: int, are_waves_advised: bool) -> None:
    """Scaling alone leaves the periods of a long time too close for a small network to learn."""
    network = nn.Sequential(nn.Linear(n_inputs, 8), nn.Tanh())
    text = advice_for_cause("input_scale", ["0"], model=network)
    assert ("f(2**k * x)" in text) == are_waves_advised
    assert len(text) <= 300, "it is repeated at the end of the run"
