"""The verdict has hindsight: it tells an explosion from a bad batch, a plateau from a loss that is stuck."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from lightning_gradguard.core.incidents import HELD, Action, Incident
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog, Series
from lightning_gradguard.report.analysis.verdict import RunVerdict, analyze_run, order_layers

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


def kinds(verdict: RunVerdict) -> dict[str, str]:
    return {symptom.kind: symptom.severity for symptom in verdict.symptoms}


def test_learning_run_is_healthy() -> None:
    verdict = analyze_run(RunLog(series(falling()), [gradients(falling(start=5.0))]))
    assert (verdict.status, verdict.headline, verdict.symptoms) == ("healthy", "healthy", ())
    assert verdict.outcome.has_learned


def test_a_norm_out_of_scale_is_named_as_at_the_end_of_the_run() -> None:
    log = RunLog(series(falling(start=5e10)), [gradients(falling(start=1e11))])
    verdict = analyze_run(log)
    assert (verdict.status, verdict.headline) == ("healthy", "healthy, with a gradient norm out of scale")
    assert "1e+11, usual: below 1000 for a mean loss" in verdict.symptoms[0].evidence
    assert "the scale of the data" in verdict.symptoms[0].remedies[0]
    unlogged = replace(log, gradients=[gradients(falling())], largest_norm=2e5)
    assert [*kinds(analyze_run(unlogged))] == ["large_norm"]


def test_norms_that_grow_over_decades_into_nan_are_exploding_gradients() -> None:
    norms = [1.2, 1.7, 30.0, 8e6, NAN, NAN]
    verdict = analyze_run(RunLog(series([4.6, 3.9, 3.8, 1e4, NAN, NAN]), [gradients(norms)]))
    assert (verdict.status, verdict.headline) == ("failed", "exploding gradients")
    (symptom,) = verdict.symptoms
    assert (symptom.severity, symptom.since, symptom.where[0]) == ("fatal", 3, "head.weight")
    assert "8e+06 (step 3)" in symptom.evidence
    remedies = " ".join(symptom.remedies)
    assert all(word in remedies for word in ("Clip", "initialization", "learning rate", "max-norm"))
    assert "LSTM" not in remedies, "there is no recurrence"
    assert (verdict.outcome.survived, verdict.outcome.steps, verdict.outcome.failed_at) == (4, 6, 4)


def test_nan_without_growth_is_no_explosion() -> None:
    losses, norms = [*falling(30), *[NAN] * 10], [*falling(30), *[NAN] * 10]
    verdict = analyze_run(RunLog(series(losses), [gradients(norms)]))
    assert verdict.headline == "nonfinite loss"
    assert "step 29 showed nothing unusual" in verdict.symptoms[0].evidence
    finite_for_longer = [*falling(31), *[NAN] * 9]
    verdict = analyze_run(RunLog(series(finite_for_longer), [gradients(norms)]))
    assert verdict.headline == "nonfinite gradients"
    assert verdict.outcome.failed_at == 30


def test_nonfinite_layer_next_to_the_output_is_named() -> None:
    n, broken = 30, [*falling(29), NAN]
    layers = {"a.weight": series(broken), "b.weight": series(broken), "head.weight": series(falling(n))}
    log = GradientLog(series([*falling(29), NAN]), layers)
    losses = [*falling(n), NAN]
    (symptom,) = analyze_run(RunLog(series(losses), [log])).symptoms
    assert symptom.kind == "nonfinite_gradient"
    assert symptom.where == ("b.weight", "a.weight")


def test_first_nonfinite_value_that_was_logged_is_named() -> None:
    weights = {"head.weight": series([*[1.0] * 29, NAN])}
    log = GradientLog(series(falling(30)), {"head.weight": series(falling(30))}, weights)
    verdict = analyze_run(RunLog(series([*falling(30), NAN]), [log]))
    assert verdict.status == "failed"
    # the loss is the first that was logged as nonfinite; the weights were a step before
    assert verdict.symptoms[0].kind == "nonfinite_loss"


def test_gap_between_logged_steps_is_reported() -> None:
    losses = Series([0, 50, 100, 150], [2.0, 1.9, 1.8, NAN])
    (symptom,) = analyze_run(RunLog(losses)).symptoms
    assert "49 steps between were not logged" in symptom.evidence


def test_divergence_is_found_from_the_loss_alone() -> None:
    verdict = analyze_run(RunLog(series([4.6, 3.9, 1.2e14, NAN])))
    assert (verdict.status, verdict.headline) == ("failed", "divergence")
    risen = analyze_run(RunLog(series([1.0 + 0.05 * i for i in range(60)])))
    assert (risen.status, kinds(risen)) == ("unhealthy", {"divergence": "serious"})


def test_vanishing_gradients_must_last_and_prevent_learning() -> None:
    flat = series([2.3] * 100)
    verdict = analyze_run(RunLog(flat, [profile(1.0)]))
    assert kinds(verdict)["vanishing_gradient"] == "serious"
    assert verdict.headline == "vanishing gradients"
    assert verdict.symptoms[0].where[0] == LAYERS[0]
    assert "shrink by 5.0 decades" in verdict.symptoms[0].evidence
    assert verdict.symptoms[0].since == 0
    learned = analyze_run(RunLog(series(falling()), [profile(1.0)]))
    assert (learned.status, kinds(learned)) == ("healthy", {"vanishing_gradient": "minor"})
    mild = analyze_run(RunLog(series(falling()), [profile(0.3)]))
    assert kinds(mild) == {}


def test_vanishing_gradients_of_the_first_steps_are_not_reported() -> None:
    bad, good = profile(1.0, 40), profile(0.1, 120)
    layers = {name: series([*bad.layers[name].values, *good.layers[name].values]) for name in bad.layers}
    log = GradientLog(series([1.0] * 160), layers)
    assert kinds(analyze_run(RunLog(series(falling(160)), [log]))) == {}


def test_constant_weights_are_stagnation() -> None:
    ratios = {"body.weight": series([1e-9] * 60), "head.weight": series([1e-3] * 60)}
    weights = dict.fromkeys(ratios, series([1.0] * 60))
    log = replace(gradients([1.0] * 60), weights=weights, ratios=ratios)
    verdict = analyze_run(RunLog(series([2.0] * 60), [log]))
    (symptom,) = verdict.symptoms
    assert (symptom.kind, symptom.where) == ("weight_stagnation", ("body.weight",))


def still(ratio: float, n: int = 150) -> GradientLog:
    ratios = {"body.weight": series([ratio] * n), "head.weight": series([1e-9] * n)}
    weights = dict.fromkeys(ratios, series([1.0] * n))
    return replace(gradients([1.0] * n), weights=weights, ratios=ratios)


def test_stuck_loss_is_flat_from_the_start() -> None:
    assert kinds(analyze_run(RunLog(series([2.3] * 150), [still(1e-9)])))["stuck_loss"] == "serious"
    plateau = [*falling(50), *[0.5] * 100]
    assert kinds(analyze_run(RunLog(series(plateau)))) == {}
    assert kinds(analyze_run(RunLog(series([2.3] * 60)))) == {}
    assert kinds(analyze_run(RunLog(series([2.3] * 29, every=10)))) == {}


def test_flat_loss_may_have_converged() -> None:
    """Half of the weights still move, or nobody knows whether they do."""
    for log in (RunLog(series([2.3] * 150), [still(1e-4)]), RunLog(series([2.3] * 150))):
        verdict = analyze_run(log)
        assert kinds(verdict)["stuck_loss"] == "minor"
        assert "or had converged before" in next(
            s.evidence for s in verdict.symptoms if s.kind == "stuck_loss"
        )
    assert (verdict.status, verdict.headline) == ("healthy", "healthy, with a flat loss of 2.3")


@pytest.mark.parametrize(
    ("losses", "over", "status"),
    [
        ([1.61 - 5e-4 * i for i in range(100)], 0.97, "unhealthy"),
        ([900.0 - 5 * i for i in range(100)], 441.0, "unhealthy"),  # on its way to the mean of the targets
        ([*[1.6] * 80, *[1.6 - 0.05 * i for i in range(20)]], 0.97, "recovered"),  # has fallen since
    ],
)
def test_a_run_that_ends_at_the_loss_of_a_constant_has_not_recovered(
    losses: list[float], over: float, status: str
) -> None:
    skip = Incident("nonfinite_loss", 10, action="skipped", cause="bad_input")
    log = RunLog(series(losses), skips=series([1.0] * 100), incidents=[skip])
    assert analyze_run(log).status == "recovered"
    verdict = analyze_run(replace(log, over_constant=over))
    assert verdict.status == status
    if status == "unhealthy":
        assert verdict.headline == "little or nothing learned"
        assert f"{over:g} times that of the best constant answer" in verdict.symptoms[0].evidence


def test_a_diagnosed_cause_is_the_headline_of_a_run_that_has_learned_little() -> None:
    found = Incident("stuck_loss", 1, where=("head",), cause="unreachable_targets")
    assert (
        analyze_run(RunLog(series(falling(150)), incidents=[found])).headline
        == "healthy, with misused loss (cause: unreachable targets)"
    )
    log = RunLog(series([1.6 - 5e-4 * i for i in range(150)]), incidents=[found])
    verdict = analyze_run(replace(log, over_constant=1.15))
    assert verdict.headline == "misused loss (cause: unreachable targets)"
    assert [*kinds(verdict)] == ["stuck_loss"]


@pytest.mark.parametrize("cause", ["targets_out_of_range", "not_log_probabilities"])
def test_a_loss_that_falls_below_0_by_what_it_is_given_has_not_learned(cause: Any) -> None:
    found = Incident("stuck_loss", 1, where=("head",), cause=cause)
    unbounded = RunLog(series([0.7 - i for i in range(150)]), incidents=[found])
    assert analyze_run(unbounded).headline == f"misused loss (cause: {cause.replace('_', ' ')})"
    assert analyze_run(replace(unbounded, loss=series(falling(150)))).status == "healthy"


def test_a_resumed_run_has_not_recovered_from_what_is_minor() -> None:
    log = RunLog(series(falling(start=5e10)), [gradients(falling(start=1e11))], skips=series([7.0] * 150))
    assert analyze_run(log).headline == "recovered, with a gradient norm out of scale"


def test_adversarial_optimizers_are_not_stuck() -> None:
    assert "stuck_loss" not in kinds(analyze_run(RunLog(series([2.3] * 150), [still(1e-9), still(1e-9)])))


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0])
@pytest.mark.parametrize("n", [10, 20, 100])
def test_noise_around_a_level_is_no_symptom(sigma: float, n: int) -> None:
    for seed in range(40):
        noise = random.Random(seed)
        losses = [math.exp(noise.gauss(0, sigma)) for _ in range(n)]
        assert analyze_run(RunLog(series(losses))).status == "healthy"


@pytest.mark.parametrize("offset", [-50.0, 50.0])
def test_loss_with_an_offset_is_not_stuck(offset: float) -> None:
    losses = [offset + 0.6 * value for value in falling(200)]
    verdict = analyze_run(RunLog(series(losses), [still(1e-9, 200)]))
    assert "stuck_loss" not in kinds(verdict)
    assert verdict.outcome.has_learned == (offset < 0)


def test_loss_that_rises_to_its_start_again_has_diverged() -> None:
    losses = [*(max(2.3 * 0.97**i, 0.1) for i in range(120)), *[2.3] * 120]
    (symptom,) = analyze_run(RunLog(series(losses), [gradients([1.0] * 120 + [0.5] * 120)])).symptoms
    assert (symptom.kind, symptom.severity) == ("divergence", "serious")
    assert symptom.since == 120
    assert "had fallen from" in symptom.evidence
    assert "to 0.1 " in symptom.evidence
    half_way = [*[2.3] * 40, *[0.1] * 80, *[1.5] * 120]
    assert kinds(analyze_run(RunLog(series(half_way))))["divergence"] == "serious"
    # a little of it lost again is a warm restart, or a harder batch
    little = [*losses[:120], *[0.5] * 120]
    assert kinds(analyze_run(RunLog(series(little)))) == {}
    rivals = [gradients([1.0] * 240), gradients([1.0] * 240)]
    assert kinds(analyze_run(RunLog(series(losses), rivals))) == {}


def test_negative_loss_can_diverge() -> None:
    assert kinds(analyze_run(RunLog(series([-1 + 3e7 * (i / 100) ** 8 for i in range(100)])))) == {
        "divergence": "serious"
    }
    assert kinds(analyze_run(RunLog(series([-1 + 0.001 * i for i in range(100)])))) == {}


def test_an_explosion_that_was_diagnosed_ahead_of_nan_is_the_cause() -> None:
    nothing = Series([9, 19, 29], [NAN] * 3)
    found = Incident(
        "exploding_gradient",
        1,
        where=("net.0",),
        value=1.9e3,
        cause="update_too_large",
        detail="Since step 0: an update of 1.9e+03 of the norm of the weights.",
        advice="Lower the rate.",
    )
    verdict = analyze_run(RunLog(nothing, [GradientLog(nothing, {"net.0": nothing})], incidents=[found]))
    assert verdict.headline == "exploding gradients (cause: update too large)"
    (symptom,) = verdict.symptoms
    assert (symptom.severity, symptom.since, symptom.remedies) == ("fatal", 1, ("Lower the rate.",))
    # finite values after it: something else has failed
    later = RunLog(Series([4, 9, 19], [2.0, NAN, NAN]), incidents=[found])
    assert analyze_run(later).headline == "nonfinite loss"


def test_a_rise_that_the_rollback_has_judged_is_no_divergence() -> None:
    losses = series([0.01 * math.exp(i / 50) for i in range(100)])
    assert kinds(analyze_run(RunLog(losses))) == {"divergence": "serious"}
    watched = RunLog(losses, skips=series([0.0] * 100))
    verdict = analyze_run(watched)
    assert (verdict.status, verdict.headline) == ("healthy", "healthy, with a loss that rises")
    acted = replace(watched, incidents=[Incident("rollback", 90, value=80.0, action="rolled_back")])
    assert "divergence" in kinds(analyze_run(acted))


def test_a_repair_after_which_something_else_fails_is_not_the_headline() -> None:
    repaired = Incident("poor_initialization", 0, where=("net.0",), action="repaired")
    stuck = Incident("stuck_loss", 60, where=("head",), detail="The loss is that of the best constant.")
    flat = series([2.0] * 100)
    verdict = analyze_run(RunLog(flat, skips=series([0.0] * 100), incidents=[repaired, stuck]))
    assert (verdict.headline, kinds(verdict)["poor_initialization"]) == ("stuck loss", "handled")
    alone = analyze_run(RunLog(flat, skips=series([0.0] * 100), incidents=[repaired]))
    assert kinds(alone)["poor_initialization"] == "serious"


def test_explosion_with_a_known_cause_is_in_the_headline_of_a_run_that_learns() -> None:
    found = Incident("exploding_gradient", 1, where=("net.0",), cause="large_weights", detail="It grows.")
    verdict = analyze_run(RunLog(series(falling()), [gradients(falling())], incidents=[found]))
    assert verdict.headline == "healthy, with exploding gradients (cause: large weights)"


def test_slow_rise_among_noise_is_divergence() -> None:
    noise = random.Random(0)
    losses = [math.exp(noise.gauss(0, 0.3) + i / 20) for i in range(40)]
    assert kinds(analyze_run(RunLog(series(losses)))) == {"divergence": "serious"}


def test_jump_at_the_end_is_divergence_and_one_low_value_is_not() -> None:
    assert kinds(analyze_run(RunLog(series([*[1.0] * 90, *[3.0] * 10]))))["divergence"] == "serious"
    assert kinds(analyze_run(RunLog(series([1.0, 1.0, 1.0, 1.0, 0.01, *[1.0] * 7])))) == {}


def test_noise_of_a_negative_loss_is_no_learning() -> None:
    for seed in range(20):
        noise = random.Random(seed)
        losses = [-1 + noise.gauss(0, 0.1) for _ in range(50)]
        assert not analyze_run(RunLog(series(losses))).outcome.has_learned


def test_huge_norm_at_the_first_step_is_an_explosion() -> None:
    assert analyze_run(RunLog(series([2.0, NAN]), [gradients([5e3, NAN])])).headline == "exploding gradients"
    assert analyze_run(RunLog(series([2.0, NAN]), [gradients([5.0, NAN])])).headline == "nonfinite loss"


def test_growing_norms_of_a_learning_run_are_no_fault() -> None:
    norms = [1e-3] * 10 + [1.0] * 90
    verdict = analyze_run(RunLog(series(falling()), [gradients(norms)]))
    assert verdict.status == "healthy"
    assert (
        kinds(analyze_run(RunLog(series([2.0] * 100), [gradients(norms)])))["exploding_gradient"] == "serious"
    )


def test_failure_before_the_first_logged_step_is_not_blamed_on_the_batch() -> None:
    nothing = Series([49, 99, 149], [NAN] * 3)
    verdict = analyze_run(RunLog(nothing, [GradientLog(nothing, {"head.weight": nothing})]))
    assert (verdict.status, verdict.outcome.survived, verdict.outcome.failed_at) == ("failed", None, 49)
    (symptom,) = verdict.symptoms
    assert "at the first logged step, 49; the 49 steps before were not logged" in symptom.evidence
    words = ("NaNRollback()", "Log the steps", "learning rate", "Clip", "InitializationCheck")
    first = symptom.remedies[: len(words)]
    assert all(word in text for word, text in zip(words, first, strict=True))
    watched = RunLog(nothing, [GradientLog(nothing, {"head.weight": nothing})], was_checked=True)
    (symptom,) = analyze_run(watched).symptoms
    assert " ".join(symptom.remedies).count("NaNRollback") == 1
    # the first step was logged: nothing is hidden
    seen = analyze_run(RunLog(Series([0, 50], [NAN] * 2)))
    assert seen.outcome.survived == 0
    assert "batch" in seen.symptoms[0].remedies[1]


def test_values_that_were_not_logged_are_not_reported() -> None:
    norms = [*falling(30), NAN, NAN]
    layers = {"body.weight": series(norms), "head.weight": series(falling(32))}
    verdict = analyze_run(RunLog(gradients=[GradientLog(series(norms), layers)]))
    assert (verdict.status, verdict.headline) == ("failed", "nonfinite gradients")
    (symptom,) = verdict.symptoms
    assert symptom.where == ("body.weight",)
    assert "1 gradients were nonfinite from step 30 on; step 29 showed nothing unusual" in symptom.evidence
    assert (verdict.outcome.first_loss, verdict.outcome.final_loss) == (None, None)


def test_one_overflow_at_the_end_is_no_failure() -> None:
    totals = [1.0] * 99
    verdict = analyze_run(RunLog(gradients=[GradientLog(series([*totals, math.inf]))]))
    assert (verdict.status, kinds(verdict)) == ("healthy", {"nonfinite_gradient": "minor"})
    assert (
        analyze_run(RunLog(gradients=[GradientLog(series([*totals, math.inf, math.inf]))])).status == "failed"
    )
    assert analyze_run(RunLog(gradients=[GradientLog(series([*totals, NAN]))])).status == "failed"


def test_stop_counts_only_at_the_end_of_the_run() -> None:
    stopped = [incident("nonfinite_loss", 98, "skipped"), incident("training_diverged", 99, "stopped")]
    assert (
        analyze_run(RunLog(series(falling()), skips=series([0.0] * 100), incidents=stopped)).status
        == "failed"
    )
    one_more = RunLog(series(falling(101)), skips=series([0.0] * 101), incidents=stopped)
    assert analyze_run(one_more).status == "failed"
    went_on = RunLog(series(falling(150)), skips=series([0.0] * 150), incidents=stopped)
    assert analyze_run(went_on).status == "recovered"


def test_clipping_without_effect_handles_no_symptom() -> None:
    norms = [1.0] * 40 + [1e5] + [1.0] * 60
    log = replace(gradients(norms), clipped=series(norms))
    assert kinds(analyze_run(RunLog(series(falling(101)), [log]))) == {"exploding_gradient": "minor"}


def test_all_details_are_reported() -> None:
    def bad(step: int, n: int) -> Incident:
        detail = f"Row 3 is NaN (sample {n})."
        return Incident("nonfinite_loss", step, cause="bad_input", detail=detail, action="skipped")

    found = [bad(40 + i, n) for i, n in enumerate((300, 301, 900, 300))]
    (symptom,) = analyze_run(RunLog(series(falling()), incidents=found)).symptoms
    assert symptom.evidence.endswith(
        "bad input: Row 3 is NaN (sample 300); Row 3 is NaN (sample 301); Row 3 is NaN (sample 900)"
    )
    (symptom,) = analyze_run(RunLog(series(falling()), incidents=[bad(40 + i, i) for i in range(8)])).symptoms
    assert symptom.evidence.endswith("(sample 4); and 3 more")


@pytest.mark.parametrize(("last", "status"), [(60, "unhealthy"), (40, "recovered")])
def test_a_run_whose_last_steps_were_skipped_has_not_recovered(last: int, status: str) -> None:
    rolled = Incident("rollback", last - 5, cause="forward_pass", action="rolled_back", value=0.0)
    found = [
        Incident("nonfinite_loss", s, cause="forward_pass", action="skipped") for s in range(last - 9, last)
    ]
    verdict = analyze_run(RunLog(series(falling(60)), [gradients(falling(60))], incidents=[*found, rolled]))
    assert verdict.status == status
    assert "nonfinite loss (cause: forward pass)" in verdict.headline


def test_incident_of_an_unknown_kind_keeps_its_advice() -> None:
    own = Incident("odd_weather", 5, advice="Wait for sunshine.")
    (symptom,) = analyze_run(RunLog(series(falling()), incidents=[own])).symptoms
    assert symptom.remedies == ("Wait for sunshine.",)
    (symptom,) = analyze_run(RunLog(series(falling()), incidents=[replace(own, advice="")])).symptoms
    assert symptom.remedies == ()


def test_one_cut_is_no_falling_learning_rate() -> None:
    """Right after a cut the rate is a tenth of the new one, and is warmed again."""
    rewarmed = series([1.0] * 24 + [0.05] * 36)
    assert kinds(analyze_run(RunLog(series([2.0] * 60), backoff_scale=rewarmed))) == {}
    cuts = [Incident("learning_rate_backoff", 24 + i, value=0.5 ** (i + 1)) for i in range(4)]
    scales = series([1.0] * 24 + [0.5 ** (i + 1) / 10 for i in range(4)] + [0.05] * 32)
    verdict = analyze_run(RunLog(series([2.0] * 60), backoff_scale=scales, incidents=cuts))
    assert kinds(verdict) == {"falling_learning_rate": "serious"}
    assert "lowered 4 times since step 24, to 0.062 of" in verdict.symptoms[0].evidence
    one = analyze_run(RunLog(series([2.0] * 60), backoff_scale=rewarmed, incidents=cuts[:1]))
    assert kinds(one) == {}


def test_a_rate_that_failed_after_it_was_found_is_not_advised() -> None:
    cuts = [Incident("learning_rate_backoff", 24 + i, value=0.5 ** (i + 1)) for i in range(4)]
    found, end = Incident("learning_rate_found", 40, value=0.01), Incident("training_diverged", 42)
    told = [
        RunLog(series([2.0] * 60), incidents=[*cuts, *more])
        for more in ([found], [found, cuts[-1]], [found, end])
    ]
    falling = [s for log in told for s in analyze_run(log).symptoms if s.kind == "falling_learning_rate"]
    assert falling[0].remedies == (f"Train with lr=0.01, {HELD}.",)
    assert not any("lr=" in s.remedies[0] for s in falling[1:])


def test_a_cure_that_was_tried_on_the_batch_is_the_next_step() -> None:
    cure = "Cure: nn.init.kaiming_normal_(model.net[0].weight, nonlinearity='relu')"
    found = Incident("poor_initialization", 0, value=0.0, detail="std 0, usual: std > 0", advice=cure)
    (symptom,) = analyze_run(RunLog(series(falling()), incidents=[found])).symptoms
    assert symptom.remedies == (cure,)
    assert symptom.evidence.endswith("at step 0: std 0, usual: std > 0")


def test_clipped_peak_is_handled_and_unclipped_peak_is_minor() -> None:
    norms = [1.0] * 40 + [1e5] + [1.0] * 60
    clipped = series([min(norm, 1.0) for norm in norms])
    handled = analyze_run(RunLog(series(falling(101)), [replace(gradients(norms), clipped=clipped)]))
    assert (handled.status, handled.headline) == ("recovered", "recovered from exploding gradients")
    assert "clipping reduced it to 1" in handled.symptoms[0].evidence
    bare = analyze_run(RunLog(series(falling(101)), [gradients(norms)]))
    assert (bare.headline, kinds(bare)) == (
        "healthy, with exploding gradients",
        {"exploding_gradient": "minor"},
    )
    not_learned = analyze_run(RunLog(series([2.0] * 101), [gradients(norms)]))
    assert kinds(not_learned)["exploding_gradient"] == "serious"


def test_layer_norm_above_the_total_counts_as_all_of_it() -> None:
    norms = [*[1.0] * 20, 1e4, *[1.0] * 20]
    log = GradientLog(series(norms), {"head.weight": series([1e300] * 41)})
    (symptom,) = analyze_run(RunLog(series(falling(41)), [log])).symptoms
    assert "nearly all of it in head.weight" in symptom.evidence


def test_hard_batch_late_in_a_run_is_no_explosion() -> None:
    norms = [*falling(300), 0.5, *falling(300)[-20:]]
    assert kinds(analyze_run(RunLog(series(falling(321)), [gradients(norms)]))) == {}


def test_small_norm_may_rise_to_its_first_level() -> None:
    norms = [*[1.0] * 20, *[0.01] * 60, 5.0, *[0.01] * 20]
    assert kinds(analyze_run(RunLog(series(falling(101)), [gradients(norms)]))) == {}


def test_zero_gradients_of_all_parameters_are_no_collapse() -> None:
    """Then there is no bias either that is still trained."""
    layers = {"body.weight": series([0.0] * 60), "head.bias": series([0.0] * 60)}
    assert "gradient_collapse" not in kinds(
        analyze_run(RunLog(gradients=[GradientLog(series([0.0] * 60), layers)]))
    )


def test_collapsed_gradients_are_found() -> None:
    n = 60
    dead = [0.0] * 40
    layers = {
        "body.weight": series([1.0] * 20 + dead),
        "head.weight": series([1.0] * 20 + dead),
        "head.bias": series([0.1] * n),
    }
    verdict = analyze_run(RunLog(series([2.3] * n), [GradientLog(series([1.0] * 20 + [0.1] * 40), layers)]))
    assert kinds(verdict)["gradient_collapse"] == "serious"
    assert verdict.symptoms[0].since == 20


def test_dead_units_are_ahead_of_the_gradients_that_collapse_behind_them() -> None:
    layers = {"body.weight": series([0.0] * 60), "head.bias": series([0.1] * 60)}
    dead = Incident("dead_units", 0, where=("body",))
    verdict = analyze_run(
        RunLog(series([2.3] * 60), [GradientLog(series([0.1] * 60), layers)], incidents=[dead])
    )
    assert kinds(verdict) == {"dead_units": "serious", "gradient_collapse": "serious"}
    assert verdict.headline == "dead units"


def test_constant_hard_clipping_is_found() -> None:
    hard = replace(
        gradients([100.0] * 60),
        clip_fraction=series([1.0] * 60),
        clip_coefficient=series([0.01] * 60),
    )
    assert kinds(analyze_run(RunLog(series([2.0] * 60), [hard]))) == {"constant_clipping": "serious"}
    assert kinds(analyze_run(RunLog(series(falling(60)), [hard]))) == {"constant_clipping": "minor"}
    few = replace(hard, clip_fraction=series([1.0] * 4), clip_coefficient=series([0.01] * 4))
    assert kinds(analyze_run(RunLog(series([2.0] * 4), [few]))) == {"constant_clipping": "minor"}
    seldom = replace(hard, clip_fraction=series([0.4] * 60))
    assert kinds(analyze_run(RunLog(series([2.0] * 60), [seldom]))) == {}
    for n, fraction in ((1, 0.9), (1, 0.4), (2, 0.9)):  # the numbers that the console has at the end
        log = RunLog(series([2.0] * 60), [hard] * n, clipped_fraction=fraction, clip_coefficient=2.6e-4)
        found = next(s for s in analyze_run(log).symptoms if s.kind == "constant_clipping")
        assert f"{fraction:.0%} of the steps were clipped, to 0.00026 of their norm" in found.evidence
        assert "multiply the learning rate by 0.00026" in found.remedies[0]
    soft = replace(hard, clip_coefficient=series([0.9] * 60))
    assert kinds(analyze_run(RunLog(series([2.0] * 60), [soft]))) == {}


def test_falling_learning_rate_is_found() -> None:
    fallen = series([0.5 ** (i // 10) for i in range(60)])
    verdict = analyze_run(RunLog(series([2.0] * 60), backoff_scale=fallen))
    assert kinds(verdict) == {"falling_learning_rate": "serious"}
    assert "5 times since step 10" in verdict.symptoms[0].evidence
    recovered = series([0.5 ** (i // 10) for i in range(60)] + [1.0])
    assert kinds(analyze_run(RunLog(series([2.0] * 61), backoff_scale=recovered))) == {}


def test_two_cuts_are_no_falling_learning_rate() -> None:
    cut = series([1.0] * 20 + [0.5] * 20 + [0.25] * 20)
    assert kinds(analyze_run(RunLog(series([2.0] * 60), backoff_scale=cut))) == {}


def test_learning_is_a_loss_lower_by_a_fifth() -> None:
    little, enough = [*[2.0] * 50, *[1.8] * 50], [*[2.0] * 50, *[1.4] * 50]
    assert [analyze_run(RunLog(series(losses))).outcome.has_learned for losses in (little, enough)] == [
        False,
        True,
    ]


def test_slow_fall_among_noise_is_not_stuck() -> None:
    losses = [2.3 - 0.001 * i + (0.2 if i % 2 else -0.2) for i in range(160)]
    assert "stuck_loss" not in kinds(analyze_run(RunLog(series(losses), [still(1e-9, 160)])))


def test_ten_logged_steps_are_enough_for_a_verdict() -> None:
    assert [analyze_run(RunLog(series(falling(n)))).status for n in (9, 10)] == ["unknown", "healthy"]


def spiky(*steps: int, level: float = 1.0, height: float = 20.0) -> RunLog:
    """Two hundred steps with spikes of loss and norm."""
    losses, norms = [level] * 200, [1.0] * 200
    for step in steps:
        losses[step], norms[step] = height, 50.0
    return RunLog(series(losses), [gradients(norms)])


def test_few_spikes_are_minor_and_adjacent_ones_count_once() -> None:
    assert kinds(analyze_run(spiky(60, 100)))["loss_spike"] == "minor"
    (once,) = [s for s in analyze_run(spiky(60, 61, 62, 63)).symptoms if s.kind == "loss_spike"]
    assert once.evidence.startswith("once, ")


def test_spike_of_a_small_loss_is_no_symptom() -> None:
    log = spiky(150, level=0.001, height=0.3)
    began_high = [*[2.0] * 25, *log.loss.values[25:]]
    assert kinds(analyze_run(replace(log, loss=series(began_high)))) == {}


def test_spikes_of_both_loss_and_norm_are_found() -> None:
    losses, norms = [1.0] * 200, [1.0] * 200
    for step in (60, 100, 140):
        losses[step], norms[step] = 20.0, 50.0
    verdict = analyze_run(RunLog(series(losses), [gradients(norms)]))
    assert kinds(verdict)["loss_spike"] == "serious"
    assert "3 times, the highest at step 60" in next(
        s.evidence for s in verdict.symptoms if s.kind == "loss_spike"
    )
    of_the_loss_alone = analyze_run(RunLog(series(losses), [gradients([1.0] * 200)]))
    assert "loss_spike" not in kinds(of_the_loss_alone)


def test_occasional_nonfinite_losses_are_minor() -> None:
    losses = falling()
    losses[40] = NAN
    verdict = analyze_run(RunLog(series(losses), [gradients(falling())]))
    assert (verdict.status, kinds(verdict)) == ("healthy", {"nonfinite_loss": "minor"})
    losses[50::4] = [NAN] * len(losses[50::4])
    losses[-1] = 0.1
    assert kinds(analyze_run(RunLog(series(losses)))) == {"nonfinite_loss": "serious"}


def incident(kind: str, step: int, action: Action = "none") -> Incident:
    return Incident(kind, step, action=action)


def test_skipped_batches_are_handled_and_their_cause_is_reported() -> None:
    skipped = [
        replace(
            incident("nonfinite_loss", step, "skipped"),
            where=("batch[0]",),
            cause="bad_input",
            detail="Row 3 is NaN.",
        )
        for step in range(40, 52)
    ]
    counts = series([0.0] * 40 + [float(i) for i in range(60)])
    verdict = analyze_run(RunLog(series(falling()), [gradients(falling())], skips=counts, incidents=skipped))
    assert (verdict.status, verdict.headline) == (
        "recovered",
        "recovered from nonfinite loss (cause: bad input)",
    )
    (symptom,) = verdict.symptoms
    assert symptom.evidence == "12 times, from step 40 to 51; 12 skipped; cause: bad input: Row 3 is NaN"
    assert "batch[0]" in symptom.remedies[0]


def test_faults_of_one_line_are_told_once() -> None:
    line = "net.py:12 in distance"
    faults = [
        replace(
            incident("nonfinite_gradient", step, "skipped"),
            cause="backward_pass",
            detail=f"sqrt given {step} returned nan, at {line}: `d.sqrt()`.",
            location=line,
        )
        for step in (8, 18, 29)
    ]
    (symptom,) = analyze_run(RunLog(series(falling()), incidents=faults)).symptoms
    assert symptom.evidence.count(line) == 1
    assert "sqrt given 8 returned nan" in symptom.evidence
    assert symptom.evidence.endswith("(the first of 3 there)")


@pytest.mark.parametrize(
    ("first", "rise", "severity"), [(85, 0.0, "handled"), (85, 1.0, "serious"), (4, 0, "serious")]
)
def test_a_fault_in_a_resumed_run_is_handled_unless_the_loss_rises(
    first: int, rise: float, severity: str
) -> None:
    losses = Series(range(first, first + 200, 5), [0.05 + 0.01 * (i % 3) + rise * i for i in range(40)])
    faults = [incident("nonfinite_loss", first + 20, "skipped")]
    assert kinds(analyze_run(RunLog(losses, incidents=faults)))["nonfinite_loss"] == severity


def test_guarded_run_does_not_fail_by_a_last_nonfinite_batch() -> None:
    losses = [*falling(99), NAN]
    guarded = analyze_run(RunLog(series(losses), skips=series([0.0] * 100)))
    assert guarded.outcome.failed_at is None
    assert analyze_run(RunLog(series(losses))).status == "failed"


def test_stopped_run_failed_by_its_last_incident() -> None:
    incidents = [
        incident("vanishing_gradient", 10),
        *(incident("nonfinite_gradient", step, action="skipped") for step in range(50, 60)),
        incident("rollback", 60, action="rolled_back"),
        incident("training_diverged", 61, action="stopped"),
    ]
    verdict = analyze_run(RunLog(series([2.0] * 62), skips=series([0.0] * 62), incidents=incidents))
    assert (verdict.status, verdict.headline) == ("failed", "nonfinite gradients")
    assert kinds(verdict) == {"nonfinite_gradient": "fatal", "vanishing_gradient": "minor"}


def test_stopped_run_without_incidents_has_remedies() -> None:
    stop = [incident("training_diverged", 59, action="stopped")]
    verdict = analyze_run(RunLog(series(falling(60)), skips=series([0.0] * 60), incidents=stop))
    assert (verdict.status, verdict.headline, kinds(verdict)) == (
        "failed",
        "training stopped",
        {"training_diverged": "fatal"},
    )
    assert "Lower the learning rate" in verdict.symptoms[0].remedies[0]


def test_rollback_handles_the_incident_before_it() -> None:
    spike = Incident("loss_spike", 40)
    back = [Incident("rollback", 41, value=30.0, action="rolled_back")]
    assert kinds(analyze_run(RunLog(series(falling()), incidents=[spike, *back]))) == {
        "loss_spike": "handled"
    }
    assert kinds(analyze_run(RunLog(series(falling()), incidents=[spike]))) == {"loss_spike": "minor"}


def test_consequences_of_a_failure_are_not_reported_again() -> None:
    log = RunLog(series([*falling(30), NAN, NAN]), incidents=[incident("nonfinite_gradient", 30)])
    assert kinds(analyze_run(log)) == {"nonfinite_loss": "fatal"}


def test_causes_precede_their_consequences() -> None:
    norms = [1.0] * 40 + [1e5] + [1.0] * 60
    clipped = series([min(norm, 1.0) for norm in norms])
    spoiled = [incident("nonfinite_weights", 41, "skipped")]
    verdict = analyze_run(
        RunLog(series(falling(101)), [replace(gradients(norms), clipped=clipped)], incidents=spoiled)
    )
    assert kinds(verdict) == {"exploding_gradient": "handled", "nonfinite_weights": "handled"}
    assert verdict.headline == "recovered from exploding gradients"


def test_poor_initialization_is_serious_without_learning() -> None:
    told = [incident("poor_initialization", 0)]
    assert kinds(analyze_run(RunLog(series([2.3] * 60), incidents=told))) == {
        "poor_initialization": "serious"
    }
    assert kinds(analyze_run(RunLog(series(falling()), incidents=told))) == {"poor_initialization": "minor"}
    still = replace(gradients([1.0] * 60), ratios={"body.weight": series([0.0] * 60)})
    dead = analyze_run(RunLog(series([2.3] * 60), [still], incidents=[incident("dead_units", 0)]))
    assert kinds(dead) == {"dead_units": "serious"}, "a loss that is stuck, and weights that rest, follow"


ODD = [[], [1.0], [NAN], [NAN] * 50, [0.0] * 50, [math.inf, 1.0], [-1.0] * 20, [1e308, 1e-320] * 20]
ODD += [[1e308] * 20 + [1e-320] * 20, [-1e308] * 20 + [1e308] * 20]


@pytest.mark.parametrize("values", ODD)
def test_every_log_has_a_verdict(values: list[float]) -> None:
    verdict = analyze_run(RunLog(series(values), [gradients(values)], backoff_scale=series(values)))
    assert verdict.headline
    if len(values) < 2 and not any(map(math.isnan, values)):
        assert verdict.status == "unknown"
    if values and all(map(math.isnan, values)):
        assert (verdict.status, verdict.outcome.survived) == ("failed", 0)


def test_losses_of_adversarial_optimizers_may_rise() -> None:
    losses = series([1.0 + 0.05 * i for i in range(60)])
    rivals = [gradients([1.0] * 60), gradients([1.0] * 60)]
    assert kinds(analyze_run(RunLog(losses, rivals))) == {}


def test_steps_are_counted_as_logged() -> None:
    assert analyze_run(RunLog(Series([0, 1, 2], [1.0] * 3))).outcome.steps == 3
    assert analyze_run(RunLog(Series([9, 19, 29], [1.0] * 3))).outcome.steps == 30
    # Hugging Face's Trainer counts from one
    assert analyze_run(RunLog(Series([10, 20, 30], [1.0] * 3))).outcome.steps == 30


def test_layers_of_symptoms_are_first() -> None:
    log = profile(1.0)
    verdict = analyze_run(RunLog(series([2.3] * 100), [log]))
    assert order_layers(log, verdict)[0] == LAYERS[0]
    assert order_layers(log, analyze_run(RunLog(series(falling()))))[0] == "head.weight"
    of_module = replace(verdict, symptoms=(replace(verdict.symptoms[0], where=("net.4",)),))
    assert order_layers(log, of_module)[0] == "net.4.weight"


def test_a_rescue_is_measured_by_the_loss_afterwards() -> None:
    flat, skips = [2.3 + 0.01 * (i % 3) for i in range(100)], series([0.0] * 30 + [1.0] * 70)
    dead = [Incident("gradient_collapse", 30, action="rolled_back")]
    verdict = analyze_run(RunLog(series(flat), [gradients(flat)], skips=skips, incidents=dead))
    assert (verdict.status, verdict.headline) == ("unhealthy", "collapsed gradients")
    assert kinds(verdict)["gradient_collapse"] == "serious"
    learned = analyze_run(RunLog(series(falling()), [gradients(flat)], skips=skips, incidents=dead))
    assert (learned.status, learned.headline) == ("recovered", "recovered from collapsed gradients")
    without_incidents = analyze_run(RunLog(series(flat), [gradients(flat)], skips=skips))
    assert without_incidents.headline == "the loss did not fall after the interventions"


@pytest.mark.parametrize("has_learned", [True, False])
def test_a_repair_is_measured_by_the_loss_afterwards(has_learned: bool) -> None:
    losses = falling() if has_learned else [2.3] * 100
    repaired = [Incident("poor_initialization", 0, action="repaired", value=-9.0)]
    verdict = analyze_run(RunLog(series(losses), [gradients(losses)], incidents=repaired))
    assert verdict.status == ("recovered" if has_learned else "unhealthy")


def test_clipping_is_the_headline_only_where_nothing_else_is_wrong() -> None:
    flat = [2.3 + 0.01 * (i % 3) for i in range(100)]
    clipped = replace(
        gradients(flat), clip_fraction=series([1.0] * 100), clip_coefficient=series([0.01] * 100)
    )
    assert analyze_run(RunLog(series(flat), [clipped])).headline == "clipping of most steps"
    skipped = [Incident("nonfinite_loss", 5, action="skipped")]
    verdict = analyze_run(RunLog(series(flat), [clipped], incidents=skipped))
    assert verdict.headline == "nonfinite loss"
    assert kinds(verdict)["constant_clipping"] == "minor"
    learned = analyze_run(RunLog(series(falling()), [clipped]))
    assert (learned.status, kinds(learned)["constant_clipping"]) == ("healthy", "minor")


@pytest.mark.parametrize(
    ("share", "headline"), [(0.64, "healthy, with clipping of most steps"), (0.4, "healthy")]
)
def test_a_run_that_the_console_calls_unusual_is_not_healthy_alone(share: float, headline: str) -> None:
    steps = [share] * 100
    clipped = replace(gradients(steps), clip_fraction=series(steps), clip_coefficient=series([0.8] * 100))
    log = RunLog(series(falling()), [clipped], clipped_fraction=share, clip_coefficient=0.8)
    assert analyze_run(log).headline == headline


@pytest.mark.parametrize("share", [1e-9, 0.05])
@pytest.mark.parametrize("is_too_large", [True, False])
def test_a_run_whose_every_step_is_clipped_far_is_not_healthy(share: float, is_too_large: bool) -> None:
    ones = [1.0] * 100
    clipped = replace(gradients(ones), clip_fraction=series(ones), clip_coefficient=series([share] * 100))
    found = [Incident("exploding_gradient", 1, cause="update_too_large")] * is_too_large
    verdict = analyze_run(RunLog(series(falling()), [clipped], incidents=found))
    is_healthy = share > 0.01 and not is_too_large
    assert (verdict.status == "healthy") == is_healthy
    cause = " (cause: update too large)" * is_too_large
    assert is_healthy or verdict.headline == f"clipping of most steps{cause}"


def test_early_stopping_at_nan_has_ended_the_run() -> None:
    stopped = Incident("nonfinite_validation", 99, where=("val_loss",), action="stopped")
    verdict = analyze_run(RunLog(series(falling()), [gradients([1.0] * 100)], incidents=[stopped]))
    assert (verdict.status, verdict.headline) == ("failed", "nonfinite validation metric")
    assert kinds(verdict) == {"nonfinite_validation": "fatal"}
    tested = Incident("nonfinite_test", 100, where=("accuracy",))  # after the fit
    verdict = analyze_run(RunLog(series(falling()), [gradients([1.0] * 100)], incidents=[stopped, tested]))
    assert verdict.headline == "nonfinite validation metric"
    assert kinds(verdict) == {"nonfinite_validation": "fatal", "nonfinite_test": "minor"}


def test_a_loss_that_is_lower_by_chance_has_not_learned() -> None:
    noisy = [12.0 + 6.0 * (-1) ** i * (i % 7) / 6 - (3.0 if i >= 180 else 0.0) for i in range(200)]
    stagnation = Incident("weight_stagnation", 10, cause="clip_value_too_small", where=("net.0",))
    verdict = analyze_run(RunLog(series(noisy), incidents=[stagnation]))
    assert not verdict.outcome.has_learned
    assert verdict.headline == "weight stagnation (cause: clip value too small)"
    assert analyze_run(RunLog(series(falling()))).outcome.has_learned


def test_a_short_run_whose_loss_falls_to_a_fifth_has_learned() -> None:
    losses = [0.645, 0.369, 0.527, 0.516, 0.447, 0.243, 0.359, 0.354, 0.245, 0.264, 0.129, 0.141]
    repair = Incident("poor_initialization", 0, action="repaired", where=("net.0",))
    verdict = analyze_run(RunLog(series(losses), incidents=[repair]))
    assert verdict.outcome.has_learned
    assert verdict.headline == "recovered from poor initialization"


def test_a_short_run_after_a_repair_has_no_verdict() -> None:
    """Six losses do not tell if it learns."""
    repair = Incident("poor_initialization", 0, action="repaired", where=("net.0",))
    losses = [1.41, 1.38, 1.4, 1.37, 1.39, 1.36]
    verdict = analyze_run(RunLog(series(losses, every=5), incidents=[repair]))
    assert (verdict.status, kinds(verdict)) == ("unknown", {"poor_initialization": "handled"})
    stuck = analyze_run(RunLog(series(losses * 2, every=5), incidents=[repair]))
    assert (stuck.status, kinds(stuck)) == ("unhealthy", {"poor_initialization": "serious"})


def test_recovery_needs_a_logged_loss() -> None:
    skipped = [incident("nonfinite_loss", 30, "skipped")]
    assert analyze_run(RunLog(series([]), [gradients(falling())], incidents=skipped)).status == "unknown"
    assert analyze_run(RunLog(series(falling()), incidents=skipped)).status == "recovered"
