"""What a diagnosis suggests: each candidate finds its place in the module."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_gradguard.core.detectors.diagnosis import Symptom
from lightning_gradguard.core.incidents import Incident, SymptomCause
from lightning_gradguard.core.remedies.changes import Change, places
from lightning_gradguard.core.remedies.kinds import ChangeKind
from lightning_gradguard.treatment.candidates import Candidate, candidates, unfit
from lightning_gradguard.treatment.learning import learning_of
from lightning_gradguard.treatment.probe import Probe, in_words, probe
from lightning_gradguard.treatment.trials.program import recorded_program
from lightning_gradguard.treatment.trials.trial import Job, Trial
from tests.treatment.programs import SHORT, Data, Net

VANISHING = Symptom("vanishing_gradient", "through_time", ("rnn",), -5.0, "", "depth")


class Sine(nn.Module):
    """An activation that is none of torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


def suggested(module: nn.Module, *symptoms: Symptom, moved: float = 1.0, **facts: Any) -> Sequence[Candidate]:
    """Candidates for a module that does not learn."""
    return candidates(probed(module, *symptoms, moved=moved, **facts))


def probed(module: nn.Module, *symptoms: Symptom, moved: float = 1.0, **facts: Any) -> Probe:
    """The probe of a module that does not learn."""
    trial = Trial(job=Job(None, 0, 100), curve=[(0, 2.3), (100, 2.3)], over_constant=1.0)
    return Probe(
        trial=trial,
        steps=60,
        symptoms=symptoms,
        initialization=[],
        incidents=[],
        module=module,
        is_automatic=True,
        has_epsilon=False,
        learning=learning_of(trial),
        moved=moved,
        decay="",
        run_loss=lambda: module(torch.ones(2, 8, 4))[0].sum(),
        **facts,
    )


def test_saturated_attention_gets_small_weights() -> None:
    saturated = Symptom("saturated_units", "large_logits", ("0",), 0.8, "", "depth")
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    assert suggested(net, saturated)[0].changes == (Change("initialize", {"to": "small"}),)


def test_explosion_and_a_loss_that_rises_leave_a_doubt() -> None:
    found = probed(nn.Linear(4, 4))
    assert not found.doubt
    exploding = Incident("exploding_gradient", 20, detail="An update of 0.66 of the norm.")
    assert (
        replace(found, incidents=[exploding]).doubt == "exploding gradients: An update of 0.66 of the norm."
    )
    curve = [(0, 1.4), (30, 0.14), (60, 0.33)]
    risen = replace(found.trial, curve=curve, over_constant=0.24)
    assert replace(found, trial=risen).doubt == "the held-out loss has risen from 0.14"
    assert not replace(found, trial=replace(risen, over_constant=0.02)).doubt
    assert replace(found, symptoms=[VANISHING]).doubt == in_words(VANISHING)
    overfit = [*((i, 1.0) for i in range(30)), *((i, 0.1) for i in range(30, 60))]
    risen = replace(risen, curve=[(0, 1.4), (30, 0.14), (60, 0.9)], training=overfit)
    assert not replace(found, trial=risen).doubt


def test_changes_without_a_place_are_named() -> None:
    deep = Symptom("exploding_gradient", "depth", ("0",), 4.4, "", "depth")
    own = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(4, 4), Sine())))
    assert unfit(probed(own, deep)) == ["add_normalization", "add_residual"]
    known = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(4, 4), nn.Tanh())))
    assert unfit(probed(known, deep)) == []


def test_gru_in_the_place_of_a_plain_recurrence_keeps_its_state() -> None:
    found = suggested(nn.RNN(4, 8, batch_first=True), VANISHING)
    gated = [{c.kind: c for c in one.changes} for one in found]
    gated = [one for one in gated if "rnn_to_gru" in one]
    assert gated
    assert all(one["gate_bias"]["value"] == 3.0 for one in gated)
    assert any("learning_rate" in one for one in gated)


def test_gates_are_set_for_the_length_of_the_sequences() -> None:
    found = suggested(nn.LSTM(4, 8, batch_first=True), replace(VANISHING, n_times=80))
    gates = [c for one in found for c in one.changes if c.kind == "gate_bias"]
    assert {c["value"] for c in gates} == {4.4}
    assert {c["input_value"] for c in gates} == {None, -4.4}


def test_gates_are_opened_only_where_there_are_some() -> None:
    found = suggested(nn.Sequential(nn.Linear(4, 8)), VANISHING)
    assert not {"rnn_to_gru", "gate_bias"} & {c.kind for one in found for c in one.changes}


def test_rate_is_raised_by_what_the_weights_lack() -> None:
    stuck = Symptom("stuck_loss", "unknown", ("head",), 1.0, "", "stuck")
    found = suggested(nn.Sequential(nn.Linear(4, 8)), stuck, moved=0.004)
    rates = [c["scale"] for one in found[:2] for c in one.changes if c.kind == "learning_rate"]
    assert rates == [1000.0, 100.0]
    assert "no weight has gone further than 0.004 of its norm" in found[0].reason


def test_rate_is_raised_further_than_by_what_the_updates_lack() -> None:
    """An LSTM under SGD learns at 10,000 times its rate; its updates are as usual at a hundred times."""
    slow = Symptom("weight_stagnation", "learning_rate_too_low", ("rnn",), 1e-4, "", "stagnation")
    found = suggested(nn.LSTM(4, 8, batch_first=True), slow, moved=0.009)
    rates = [c["scale"] for one in found[:3] for c in one.changes if c.kind == "learning_rate"]
    assert rates == [100.0, 1000.0, 10000.0]


def test_what_helps_if_gradients_vanish_is_tried_before_a_higher_rate() -> None:
    first, second, both, *_ = suggested(nn.RNN(4, 8, batch_first=True), VANISHING, moved=0.004)
    assert [change.kind for change in first.changes] == ["orthogonal_recurrent"]
    assert [change["scale"] for change in second.changes] == [1000.0]
    assert {*both.changes} == {*first.changes, *second.changes}


def test_rate_is_not_raised_beside_what_helps_against_several_symptoms() -> None:
    """A rate of a thousand times learned in short trials, and failed in a run with another seed."""
    layers = [part for _ in range(4) for part in (nn.Linear(4, 4), nn.ReLU())]
    symptoms = [replace(VANISHING, cause=cause) for cause in ("depth", "small_weights")]
    found = suggested(nn.Sequential(*layers), *symptoms, moved=0.004)
    kinds = [{change.kind for change in one.changes} for one in found]
    assert {"add_residual", "initialize"} in kinds
    assert {"add_residual", "initialize", "learning_rate"} not in kinds


class Exponential(nn.Module):
    """An activation of the user's own."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Returns the exponentials."""
        return inputs.exp()


def test_blocks_with_an_activation_of_ones_own_get_residuals_once_it_is_replaced() -> None:
    layers = [part for n in (4, 8, 8) for part in (nn.Linear(n, 8), Exponential())]
    nonfinite = Symptom("nonfinite_loss", "loss", ("head",), 1.0, "", "contract")
    kinds = [
        {c.kind for c in one.changes} for one in suggested(nn.Sequential(*layers, nn.Linear(8, 2)), nonfinite)
    ]
    assert {"replace_activation", "add_normalization", "add_residual"} in kinds
    assert {"add_residual"} not in kinds


@pytest.mark.parametrize(
    "symptom",
    [
        Symptom("dead_units", "unknown", ("0",), 1.0, "", "units"),
        Symptom("exploding_gradient", "large_weights", ("0",), 3.0, "", "depth"),
    ],
)
def test_rate_is_not_raised_where_units_are_dead_or_weights_large(symptom: Symptom) -> None:
    found = suggested(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), symptom, moved=0.004)
    rates = [c["scale"] for one in found for c in one.changes if c.kind == "learning_rate"]
    assert all(rate <= 10 for rate in rates)


@pytest.mark.parametrize(
    ("targets", "rate", "kinds"),
    [
        ((4000.0, 1000.0), 1e-3, ["scale_output", "standardize_input", "learning_rate"]),
        ((4000.0, 1000.0), math.nan, ["scale_output", "standardize_input"]),
        ((0.5, 1.0), 1e-3, ["learning_rate"]),
    ],
)
def test_targets_of_thousands_are_scaled_with_a_rate_that_fits(
    targets: tuple[float, float], rate: float, kinds: list[str]
) -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    first, *_ = suggested(network, targets=targets, plain_rate=rate)
    assert [change.kind for change in first.changes] == kinds
    if kinds[-1] == "learning_rate" and len(kinds) > 1:
        assert first.changes[-1]["scale"] == 100.0


def test_optimizer_without_an_epsilon_gets_none() -> None:
    nonfinite = Symptom("nonfinite_loss", "loss", ("head",), 1.0, "", "contract")
    found = suggested(nn.Sequential(nn.Linear(4, 8)), nonfinite)
    assert found
    assert "epsilon" not in {c.kind for one in found for c in one.changes}


@pytest.mark.parametrize(
    ("cause", "words"),
    [("unknown", "dead units at net.0"), ("input_scale", "dead units at net.0: input scale")],
)
def test_symptom_without_evidence_is_named_by_its_place(cause: SymptomCause, words: str) -> None:
    assert in_words(Symptom("dead_units", cause, ("net.0",), 0.0, "", "units")).lower() == words


class Functional(Net):
    """Functions between layers, and a step that asks its Trainer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(m for m in self.net if isinstance(m, nn.Linear))
        del self.net

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Validates nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        for layer in self.layers[:-1]:
            x = nn.functional.relu(layer(x))
        loss = nn.functional.cross_entropy(self.layers[-1](x), labels)
        return loss * (1.0 if self.trainer.current_epoch >= 0 else 0.0)


@pytest.mark.parametrize("kind", ["add_normalization", "initialize", "standardize_input"])
def test_layers_before_functions_are_found_where_the_step_asks_its_trainer(kind: ChangeKind) -> None:
    program = recorded_program(Functional, Data(), SHORT, 0, 4, math.inf)
    found = probe(program, 4, 4, math.inf)
    names = ["layers.0"] if kind == "standardize_input" else ["layers.0", "layers.1"]
    assert places(found.module, Change(kind), found.run_loss)[:2] == names


def test_program_that_learns_nothing_in_half_of_its_run_has_shown_that() -> None:
    """What a schedule may teach it late is waited for."""

    class Deeper(Net):
        def __init__(self) -> None:
            super().__init__(12, nn.Sigmoid)

    class Scheduled(Deeper):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

    for make, steps in ((Deeper, 40), (Scheduled, 80), (Net, 80)):
        found = probe(recorded_program(make, Data(), {"max_steps": 80}, 0, 80, math.inf), 30, 80, math.inf)
        assert found.steps == steps
        assert found.shows(80)


class Lazy(Net):
    """Weights get their shapes from the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(4))


def test_lazy_module_is_probed() -> None:
    program = recorded_program(Lazy, Data(), SHORT, 0, 4, math.inf)
    assert not probe(program, 4, 8, math.inf).trial.error
