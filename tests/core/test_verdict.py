"""The verdict has hindsight: it tells an explosion from a bad batch, a plateau from a loss that is stuck."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from lightning_gradguard.core.run_log import GradientLog, RecordedIncident, RunLog, Series
from lightning_gradguard.core.verdict import Verdict, judge, worst_layers

NAN = math.nan
LAYERS = [f"net.{i}.weight" for i in range(0, 12, 2)]


def series(values: Sequence[float], every: int = 1) -> Series:
    return Series(range(0, len(values) * every, every), values)


def falling(n: int = 100, start: float = 2.0) -> list[float]:
    return [start * 0.97**i for i in range(n)]


def gradients(total: Sequence[float]) -> GradientLog:
    layers = {"body.weight": series([v * 0.1 for v in total]), "head.weight": series(total)}
    return GradientLog(series(total), layers)


def profile(decades_a_layer: float, n: int = 100) -> GradientLog:
    """Six layers, of which the last is the output; the first has the smallest gradient."""
    layers = {
        name: series([10 ** (decades_a_layer * (i - 5))] * n)
        for i, name in enumerate([*LAYERS, "head.weight"])
    }
    weights = {name: series([1.0] * n) for name in layers}
    return GradientLog(series([1.0] * n), layers, weights)


def kinds(verdict: Verdict) -> dict[str, str]:
    return {symptom.kind: symptom.severity for symptom in verdict.symptoms}


def test_a_run_that_learns_is_healthy() -> None:
    verdict = judge(RunLog(series(falling()), [gradients(falling(start=5.0))]))
    assert (verdict.status, verdict.headline, verdict.symptoms) == ("healthy", "healthy", ())
    assert verdict.outcome.has_learned


def test_norms_that_grow_over_decades_into_nan_explode() -> None:
    norms = [1.2, 1.7, 30.0, 8e6, NAN, NAN]
    verdict = judge(RunLog(series([4.6, 3.9, 3.8, 1e4, NAN, NAN]), [gradients(norms)]))
    assert (verdict.status, verdict.headline) == ("dead", "exploding gradients")
    (symptom,) = verdict.symptoms
    assert (symptom.severity, symptom.since, symptom.where[0]) == ("fatal", 3, "head.weight")
    assert "8e+06 (step 3)" in symptom.evidence
    remedies = " ".join(symptom.remedies)
    assert all(word in remedies for word in ("Clip", "initialization", "LSTM", "GRU"))
    assert (verdict.outcome.survived, verdict.outcome.steps, verdict.outcome.died_at) == (4, 6, 4)


def test_nan_out_of_the_blue_is_no_explosion() -> None:
    losses, norms = [*falling(30), *[NAN] * 10], [*falling(30), *[NAN] * 10]
    verdict = judge(RunLog(series(losses), [gradients(norms)]))
    assert verdict.headline == "nonfinite loss"
    assert "step 29 showed nothing unusual" in verdict.symptoms[0].evidence
    finite_for_longer = [*falling(31), *[NAN] * 9]
    verdict = judge(RunLog(series(finite_for_longer), [gradients(norms)]))
    assert verdict.headline == "nonfinite gradients"
    assert verdict.outcome.died_at == 30


def test_the_nonfinite_layer_next_to_the_output_is_named() -> None:
    n, sick = 30, [*falling(29), NAN]
    layers = {"a.weight": series(sick), "b.weight": series(sick), "head.weight": series(falling(n))}
    log = GradientLog(series([*falling(29), NAN]), layers)
    losses = [*falling(n), NAN]
    (symptom,) = judge(RunLog(series(losses), [log])).symptoms
    assert symptom.kind == "nonfinite_gradient"
    assert symptom.where == ("b.weight", "a.weight")


def test_weights_that_were_nonfinite_first() -> None:
    weights = {"head.weight": series([*[1.0] * 29, NAN])}
    log = GradientLog(series(falling(30)), {"head.weight": series(falling(30))}, weights)
    verdict = judge(RunLog(series([*falling(30), NAN]), [log]))
    assert verdict.status == "dead"
    # the loss is the first that was logged as nonfinite; the weights were a step before
    assert verdict.symptoms[0].kind == "nonfinite_loss"


def test_a_gap_in_what_was_logged_is_said() -> None:
    losses = Series([0, 50, 100, 150], [2.0, 1.9, 1.8, NAN])
    (symptom,) = judge(RunLog(losses)).symptoms
    assert "49 steps between were not logged" in symptom.evidence


def test_a_loss_alone_can_say_that_it_diverged() -> None:
    verdict = judge(RunLog(series([4.6, 3.9, 1.2e14, NAN])))
    assert (verdict.status, verdict.headline) == ("dead", "divergence")
    risen = judge(RunLog(series([1.0 + 0.05 * i for i in range(60)])))
    assert (risen.status, kinds(risen)) == ("sick", {"divergence": "serious"})


def test_vanishing_needs_to_last_and_to_hurt() -> None:
    flat = series([2.3] * 100)
    verdict = judge(RunLog(flat, [profile(1.0)]))
    assert kinds(verdict)["vanishing_gradient"] == "serious"
    assert verdict.headline == "vanishing gradients"
    assert verdict.symptoms[0].where[0] == LAYERS[0]
    assert "lose 5.0 decades" in verdict.symptoms[0].evidence
    learned = judge(RunLog(series(falling()), [profile(1.0)]))
    assert (learned.status, kinds(learned)) == ("healthy", {"vanishing_gradient": "minor"})
    mild = judge(RunLog(series(falling()), [profile(0.3)]))
    assert kinds(mild) == {}


def test_what_was_only_there_at_first_is_not_told() -> None:
    sick, well = profile(1.0, 40), profile(0.1, 120)
    layers = {name: series([*sick.layers[name].values, *well.layers[name].values]) for name in sick.layers}
    log = GradientLog(series([1.0] * 160), layers)
    assert kinds(judge(RunLog(series(falling(160)), [log]))) == {}


def test_stagnation() -> None:
    ratios = {"body.weight": series([1e-9] * 60), "head.weight": series([1e-3] * 60)}
    weights = dict.fromkeys(ratios, series([1.0] * 60))
    log = replace(gradients([1.0] * 60), weights=weights, ratios=ratios)
    verdict = judge(RunLog(series([2.0] * 60), [log]))
    (symptom,) = verdict.symptoms
    assert (symptom.kind, symptom.where) == ("weight_stagnation", ("body.weight",))


def test_stuck_is_from_the_start_not_a_plateau() -> None:
    assert kinds(judge(RunLog(series([2.3] * 150)))) == {"stuck_loss": "serious"}
    plateau = [*falling(50), *[0.5] * 100]
    assert kinds(judge(RunLog(series(plateau)))) == {}
    short = judge(RunLog(series([2.3] * 60)))
    assert kinds(short) == {}


def test_a_peak_that_was_clipped_is_handled_and_one_that_was_not_is_minor() -> None:
    norms = [1.0] * 40 + [1e5] + [1.0] * 60
    clipped = series([min(norm, 1.0) for norm in norms])
    handled = judge(RunLog(series(falling(101)), [replace(gradients(norms), clipped=clipped)]))
    assert (handled.status, handled.headline) == ("rescued", "rescued from exploding gradients")
    assert "clipping brought it down to 1" in handled.symptoms[0].evidence
    bare = judge(RunLog(series(falling(101)), [gradients(norms)]))
    assert (bare.status, kinds(bare)) == ("healthy", {"exploding_gradient": "minor"})
    not_learned = judge(RunLog(series([2.0] * 101), [gradients(norms)]))
    assert kinds(not_learned)["exploding_gradient"] == "serious"


def test_a_hard_batch_late_in_a_run_is_no_explosion() -> None:
    norms = [*falling(300), 0.5, *falling(300)[-20:]]
    assert kinds(judge(RunLog(series(falling(321)), [gradients(norms)]))) == {}


def test_a_network_that_died() -> None:
    n = 60
    dead = [0.0] * 40
    layers = {
        "body.weight": series([1.0] * 20 + dead),
        "head.weight": series([1.0] * 20 + dead),
        "head.bias": series([0.1] * n),
    }
    verdict = judge(RunLog(series([2.3] * n), [GradientLog(series([1.0] * 20 + [0.1] * 40), layers)]))
    assert kinds(verdict)["gradient_collapse"] == "serious"
    assert verdict.symptoms[0].since == 20


def test_hard_clipping_all_the_time() -> None:
    hard = replace(
        gradients([100.0] * 60),
        clip_fraction=series([1.0] * 60),
        clip_coefficient=series([0.01] * 60),
    )
    assert kinds(judge(RunLog(series([2.0] * 60), [hard]))) == {"constant_clipping": "serious"}
    assert kinds(judge(RunLog(series(falling(60)), [hard]))) == {"constant_clipping": "minor"}
    soft = replace(hard, clip_coefficient=series([0.9] * 60))
    assert kinds(judge(RunLog(series([2.0] * 60), [soft]))) == {}


def test_a_learning_rate_that_keeps_falling() -> None:
    fallen = series([0.5 ** (i // 10) for i in range(60)])
    verdict = judge(RunLog(series([2.0] * 60), backoff_scale=fallen))
    assert kinds(verdict) == {"falling_learning_rate": "serious"}
    assert "5 times since step 10" in verdict.symptoms[0].evidence
    recovered = series([0.5 ** (i // 10) for i in range(60)] + [1.0])
    assert kinds(judge(RunLog(series([2.0] * 61), backoff_scale=recovered))) == {}


def test_spikes_of_loss_and_norm() -> None:
    losses, norms = [1.0] * 200, [1.0] * 200
    for step in (60, 100, 140):
        losses[step], norms[step] = 20.0, 50.0
    verdict = judge(RunLog(series(losses), [gradients(norms)]))
    assert kinds(verdict)["loss_spike"] == "serious"
    assert "3 times, the highest at step 60" in next(
        s.evidence for s in verdict.symptoms if s.kind == "loss_spike"
    )
    of_the_loss_alone = judge(RunLog(series(losses), [gradients([1.0] * 200)]))
    assert "loss_spike" not in kinds(of_the_loss_alone)


def test_nonfinite_now_and_then() -> None:
    losses = falling()
    losses[40] = NAN
    verdict = judge(RunLog(series(losses), [gradients(falling())]))
    assert (verdict.status, kinds(verdict)) == ("healthy", {"nonfinite_loss": "minor"})
    losses[50::4] = [NAN] * len(losses[50::4])
    losses[-1] = 0.1
    assert kinds(judge(RunLog(series(losses)))) == {"nonfinite_loss": "serious"}


def incident(kind: str, step: int, action: str = "none") -> RecordedIncident:
    return RecordedIncident(kind, step, action=action)


def test_skipped_batches_are_a_rescue_and_their_cause_is_told() -> None:
    skipped = [
        RecordedIncident(
            "nonfinite_loss", step, ("batch[0]",), NAN, "skipped", cause="bad input", detail="Row 3 is NaN."
        )
        for step in range(40, 52)
    ]
    counts = series([0.0] * 40 + [float(i) for i in range(60)])
    verdict = judge(RunLog(series(falling()), [gradients(falling())], skips=counts, incidents=skipped))
    assert (verdict.status, verdict.headline) == ("rescued", "rescued from nonfinite loss")
    (symptom,) = verdict.symptoms
    assert symptom.evidence == "12 times, from step 40 to 51; 12 skipped; cause: bad input: Row 3 is NaN"
    assert "batch[0]" in symptom.remedies[0]


def test_a_guarded_run_does_not_die_of_a_last_nonfinite_batch() -> None:
    losses = [*falling(99), NAN]
    guarded = judge(RunLog(series(losses), skips=series([0.0] * 100)))
    assert guarded.outcome.died_at is None
    assert judge(RunLog(series(losses))).status == "dead"


def test_a_run_that_was_given_up_died_of_what_came_last() -> None:
    incidents = [
        incident("vanishing_gradient", 10),
        *(incident("nonfinite_gradient", step, action="skipped") for step in range(50, 60)),
        incident("rollback", 60, action="rolled back"),
        incident("training_diverged", 61, action="stopped"),
    ]
    verdict = judge(RunLog(series([2.0] * 62), skips=series([0.0] * 62), incidents=incidents))
    assert (verdict.status, verdict.headline) == ("dead", "nonfinite gradients")
    assert kinds(verdict) == {"nonfinite_gradient": "fatal", "vanishing_gradient": "minor"}


def test_a_poor_initialization_matters_where_nothing_was_learned() -> None:
    told = [incident("poor_initialization", 0)]
    assert kinds(judge(RunLog(series([2.3] * 60), incidents=told))) == {"poor_initialization": "serious"}
    assert kinds(judge(RunLog(series(falling()), incidents=told))) == {"poor_initialization": "minor"}


@pytest.mark.parametrize("values", [[], [1.0], [NAN], [NAN] * 50, [0.0] * 50, [math.inf, 1.0], [-1.0] * 20])
def test_any_log_has_a_verdict(values: list[float]) -> None:
    verdict = judge(RunLog(series(values), [gradients(values)], backoff_scale=series(values)))
    assert verdict.headline
    if len(values) < 2 and not any(map(math.isnan, values)):
        assert verdict.status == "unknown"
    if values and all(map(math.isnan, values)):
        assert (verdict.status, verdict.outcome.survived) == ("dead", 0)


def test_networks_trained_against_each_other_may_raise_a_loss() -> None:
    losses = series([1.0 + 0.05 * i for i in range(60)])
    rivals = [gradients([1.0] * 60), gradients([1.0] * 60)]
    assert kinds(judge(RunLog(losses, rivals))) == {}


def test_steps_are_counted_as_they_were_logged() -> None:
    assert judge(RunLog(Series([0, 1, 2], [1.0] * 3))).outcome.steps == 3
    assert judge(RunLog(Series([9, 19, 29], [1.0] * 3))).outcome.steps == 30
    # Hugging Face's Trainer counts from one
    assert judge(RunLog(Series([10, 20, 30], [1.0] * 3))).outcome.steps == 30


def test_the_worst_layer_comes_first() -> None:
    log = profile(1.0)
    verdict = judge(RunLog(series([2.3] * 100), [log]))
    assert worst_layers(log, verdict)[0] == LAYERS[0]
    assert worst_layers(log, judge(RunLog(series(falling()))))[0] == "head.weight"
