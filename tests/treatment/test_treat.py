"""`treat` finds what makes a failing program train, leaves a healthy one alone, and keeps its budget."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_gradguard
from lightning_gradguard import Change, TreatmentError, TreatmentResult
from lightning_gradguard.cli.messages import UsageError
from lightning_gradguard.cli.parsing.preparse import read_config
from lightning_gradguard.strict_json import to_json
from lightning_gradguard.treatment.candidates import MAX_CANDIDATES, Candidate
from lightning_gradguard.treatment.learning import learning_of
from lightning_gradguard.treatment.page import text_of
from lightning_gradguard.treatment.probe import Probe
from lightning_gradguard.treatment.search import TrialRunner
from lightning_gradguard.treatment.trials.program import Program
from lightning_gradguard.treatment.trials.trial import Job, Trial
from lightning_gradguard.treatment.trials.trial_log import content_of
from lightning_gradguard.treatment.verification import SeedResult, Verification, Verified, verdict_of
from tests.treatment.programs import Data, Net, treated

SCHEMA = json.loads((Path(lightning_gradguard.__file__).parent / "treatment" / "schema.json").read_text())
#: A run that is long enough for a cured network to settle.
SETTLING = {"max_steps": 90}
deep_sigmoid = partial(Net, 6, nn.Sigmoid)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> TreatmentResult:
    """A whole treatment of a network whose gradients vanish, in one process."""
    return treated(deep_sigmoid, out=tmp_path_factory.mktemp("deep"), trainer=SETTLING)


@pytest.mark.slow
def test_deep_sigmoid_network_is_cured_on_fresh_seeds(deep: TreatmentResult) -> None:
    assert deep.verdict == "cured", deep.evidence
    assert any(change.is_of_module for change in deep.changes)
    assert len(deep.verification) == 3
    for seed in deep.verification:
        assert seed.treated.loss < 0.75 * seed.untreated.loss
    reached = deep.verification[0].treated.curve[-1][0]
    assert reached == SETTLING["max_steps"], "a cure is proved at the length of the run"
    assert "vanishing" in deep.problems[0].lower()
    content = json.loads((deep.folder / "treatment.json").read_text())
    jsonschema.validate(content, SCHEMA)
    page = (deep.folder / "report.html").read_text()
    assert "<svg" in page
    assert deep.evidence.split(";")[0] in page
    trials = {path.name for path in (deep.folder / "runs").iterdir()}
    assert len(trials) == len(deep.trials) + 1


def test_schema_has_each_field_of_a_trial() -> None:
    fields = content_of(Trial(job=Job(None, 0, 1)))
    assert set(fields) == set(SCHEMA["$defs"]["trial"]["properties"])


@pytest.mark.parametrize("learns", [True, False])
def test_program_with_a_doubt_is_run_with_a_second_seed_before_it_is_healthy(
    monkeypatch: pytest.MonkeyPatch, learns: bool
) -> None:
    class Lucky(Net):
        def __init__(self) -> None:
            super().__init__()
            if not learns and torch.initial_seed() == 1:
                for weight in self.net.parameters():
                    weight.data.mul_(1e4)

    monkeypatch.setattr(Probe, "doubt", property(lambda _: "a doubt"))
    monkeypatch.setattr("lightning_gradguard.treatment.treat.candidates", lambda _: [])
    result = treated(Lucky)
    assert (result.verdict == "healthy") == learns
    assert result.seed == (0 if learns else 1)
    begins = (
        "A doubt; with seed 1, the held-out" if learns else "A doubt; seed 0 learns, and with seed 1, the"
    )
    assert result.notes[-1].startswith(begins)


def test_healthy_program_is_left_alone() -> None:
    state = torch.get_rng_state()
    result = treated(Net)
    assert torch.equal(state, torch.get_rng_state())
    assert result.verdict == "healthy"
    assert not result.changes
    assert not result.trials
    assert not result.notes, "no second seed is run"
    assert "times that of the best constant answer" in result.evidence
    assert not Path("treatment/treatment.yaml").exists()
    with pytest.raises(ValueError, match="There is no treatment"):
        result.callbacks()


@pytest.mark.slow
def test_rate_a_hundred_times_too_high_is_lowered() -> None:
    result = treated(partial(Net, 4, nn.ReLU, rate=1.0), trainer=SETTLING)
    assert result.verdict == "cured", result.evidence
    assert [change.kind for change in result.changes] == ["learning_rate"]
    assert result.changes[0]["scale"] <= 0.1
    before, after = result.costs["parameters"]
    assert before == after


class Saturated(Net):
    """A network of large weights, which learns a half."""

    def __init__(self) -> None:
        super().__init__(4, nn.Tanh)
        for layer in list(self.net)[:-1]:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight)


@pytest.mark.slow
def test_program_that_learns_halfway_is_cured() -> None:
    result = treated(Saturated, trainer=SETTLING)
    assert learning_of(result.probe).has_learned, "it might pass for a healthy one"
    assert result.verdict == "cured", result.evidence
    for one in result.verification:
        assert one.untreated.curve[-1][0] == SETTLING["max_steps"], "it learns: a short run shows little"
        assert one.treated.loss < 0.75 * one.untreated.loss


class Prices(Data):
    """Values in the thousands of inputs in the hundreds."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("training", "validation"):
            x, _ = getattr(self, name).tensors
            y = 4000 + 1000 * torch.tanh(x[:, :1] + x[:, 1:2] * x[:, 2:3])
            setattr(self, name, TensorDataset(100 * x + 300, y))


class Values(pl.LightningModule):
    """Predicts values as they are, by SGD, at a rate for standardized ones."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.slow
def test_raw_inputs_and_targets_are_scaled_together() -> None:
    result = treated(Values, Prices(), trainer={"max_steps": 200})
    assert result.verdict == "cured", result.evidence
    kinds = {change.kind for change in result.changes}
    assert {"scale_output", "standardize_input"} <= kinds


@pytest.mark.slow
def test_treatment_that_was_killed_continues(deep: TreatmentResult) -> None:
    known = (deep.folder / "trials.jsonl").read_text().splitlines()[:4]
    path = Path("again/trials.jsonl")
    path.parent.mkdir()
    path.write_text("\n".join(known) + '\n{"changes": [{"ki')  # the line that was being written
    result = treated(deep_sigmoid, out="again", trainer=SETTLING)
    assert result.verdict == "cured"
    assert result.notes[-1].startswith("Continued with 3 trials")
    assert path.read_text().splitlines()[:4] == known
    assert [outcome(t) for t in result.trials] == [outcome(t) for t in deep.trials]


def outcome(trial: Trial) -> Any:
    return trial.job.key, trial.curve


@pytest.mark.slow
def test_trials_in_processes_are_those_of_one_process(deep: TreatmentResult) -> None:
    alone, together = (
        dict(map(outcome, r.trials)) for r in (deep, treated(deep_sigmoid, processes=2, trainer=SETTLING))
    )
    common = alone.keys() & together.keys()
    assert len(common) >= 6, "the verification at least"
    assert all(alone[key] == together[key] for key in common)


class Exponential(nn.Module):
    """An activation of the user's, with which a deep network overflows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


@pytest.mark.slow
def test_step_that_raises_on_nonfinite_values_is_treated() -> None:
    class Checked(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            probabilities = self.net(batch[0]).softmax(1)
            return nn.functional.binary_cross_entropy(
                probabilities, nn.functional.one_hot(batch[1], 4).float()
            )

    result = treated(partial(Checked, 6, Exponential))
    assert any("between 0 and 1" in problem for problem in result.problems)
    assert result.is_treated, result.evidence
    assert "replace_activation" in [change.kind for change in result.changes]


class TestBadInput:
    def test_same_module_each_time(self) -> None:
        module = Net()
        with pytest.raises(TreatmentError, match="same module.*have it build a new one"):
            treated(lambda: module)

    def test_module_that_cannot_be_built(self) -> None:
        with pytest.raises(TreatmentError, match=r"could not be built: TypeError.*test_treat.py"):
            treated(lambda: Net(*"four"))

    def test_module_or_data_of_another_kind(self) -> None:
        with pytest.raises(TreatmentError, match=r"is a Net, and no function that builds one: lambda: Net"):
            treated(Net())
        with pytest.raises(TreatmentError, match=r"is a DataLoader, and no LightningDataModule"):
            treated(Net, DataLoader(TensorDataset(torch.zeros(2, 3))))

    def test_no_optimizer(self) -> None:
        class Untrained(Net):
            def configure_optimizers(self) -> Any:
                return None

        with pytest.raises(TreatmentError, match="no optimizer: nothing is trained"):
            treated(Untrained)

    def test_step_that_raises(self) -> None:
        class Wrong(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self.net(batch[0][:, :3]).sum()  # type: ignore[no-any-return]

        with pytest.raises(TreatmentError, match=r"training step.*fails: RuntimeError.*test_treat.py"):
            treated(Wrong)

    @pytest.mark.parametrize("name", ["treatment.yaml", "runs/own"])
    def test_folder_with_files_of_the_user(self, name: str) -> None:
        path = Path("own") / name
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(TreatmentError, match=r"own has .* but no trials.jsonl.*another folder"):
            treated(Net, out="own")
        assert path.read_text() == "mine"

    def test_folder_with_a_treatment_of_another_program(self) -> None:
        folder = Path("other")
        treated(Net, out=folder, trainer={"max_steps": 40})
        log = folder / "trials.jsonl"
        head = log.read_text()
        log.write_text(head + to_json(content_of(Trial(job=Job(None, 0, 1)))) + "\n")
        (folder / "treatment.yaml").write_text("trainer: {}")
        files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with pytest.raises(
            TreatmentError, match=r"other/trials.jsonl has the trials of another.*--out.*delete"
        ):
            treated(Net, out=folder)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files

    def test_no_data(self) -> None:
        with pytest.raises(TreatmentError, match="data could not be read"):
            treated(Net, pl.LightningDataModule())

    def test_budget_that_is_no_time(self) -> None:
        with pytest.raises(ValueError, match="budget='soon' must be a time such as"):
            treated(Net, budget="soon")

    def test_budget_too_small_for_two_trials(self) -> None:
        class Slow(Net):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                time.sleep(0.01)
                return super().training_step(batch, batch_idx)

        result = treated(partial(Slow, 6, nn.Sigmoid), budget=2, trainer={"max_steps": 2000})
        assert result.verdict == "budget_too_small"
        assert result.headline.endswith("no trial was made, as the budget is too small")
        assert "give at least" in result.evidence
        assert json.loads(Path("treatment/treatment.json").read_text())["evidence"] == result.evidence

    def test_no_validation_data(self) -> None:
        result = treated(Net, Data(has_validation=False))
        assert result.verdict == "healthy"
        assert result.notes == ["There are no validation data: 3 of 20 batches of training are held out."]
        assert result.metric == "loss of training_step on 3 held-out training batches"

    def test_data_that_differ_each_time(self) -> None:
        class Random(Data):
            def train_dataloader(self) -> Any:
                generator = torch.Generator()
                generator.seed()
                return torch.utils.data.DataLoader(self.training, 32, shuffle=True, generator=generator)

        result = treated(Net, Random())
        assert "give other batches each time" in result.notes[0]


class Decayed(Net):
    """A schedule that is meant for epochs is stepped once a batch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.6)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@pytest.mark.slow
def test_schedule_that_takes_the_rate_away_is_removed() -> None:
    result = treated(Decayed, trainer=SETTLING)
    assert result.verdict == "cured", result.evidence
    assert [change.kind for change in result.changes] == ["constant_rate"]
    assert any("the schedule leaves 0.0" in problem for problem in result.problems)
    assert all(c.changes[0].kind == "constant_rate" for c in result.candidates), "no rate makes up for it"


class Manual(Net):
    """Steps by hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()  # type: ignore[union-attr]


@pytest.mark.slow
def test_manual_optimization_gets_rates_and_initialization_only() -> None:
    result = treated(partial(Manual, 4, nn.ReLU, rate=1.0), trainer=SETTLING)
    assert "several optimizers or manual optimization" in " ".join(result.notes)
    assert result.verdict == "cured", result.evidence
    kinds = {c.kind for candidate in result.candidates for c in candidate.changes}
    assert kinds <= {"learning_rate", "warm_up", "clipping", "weight_norm", "initialize"}


@pytest.mark.parametrize(("trainer", "planned"), [({"max_steps": 60}, 60), ({"max_epochs": 3}, 120)])
def test_a_run_of_epochs_has_all_steps_that_its_batches_make(trainer: dict[str, int], planned: int) -> None:
    program = Program(Net, None, trainer, Any, 60, 1.0, 0).with_manual_steps(batches=30, steps=60)  # type: ignore[arg-type]
    assert program.planned == planned
    assert program.n_batches(planned) == planned / 2


def test_batches_with_two_optimizer_steps_are_counted() -> None:
    class Twice(Manual):
        def configure_optimizers(self) -> Any:
            halves = self.net[:2], self.net[2:]
            return [torch.optim.Adam(half.parameters(), 1e-2) for half in halves]

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            self.manual_backward(Net.training_step(self, batch, batch_idx))
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()

    result = treated(Twice, trainer={"max_steps": 120})
    assert result.verdict == "healthy"
    assert "after 120 steps" in result.evidence


def test_schedule_that_the_step_itself_steps_is_prescribed() -> None:
    class ByHand(Manual, Decayed):
        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            super().training_step(batch, batch_idx)
            self.lr_schedulers().step()  # type: ignore[union-attr]

    result = treated(ByHand)
    assert result.verdict == "no_treatment_found"
    assert [one.fault for one in result.prescriptions] == ["learning_rate_schedule"]
    assert not result.trials


def test_loss_that_falls_by_a_fault_of_code_is_not_healthy() -> None:
    class Unnormalized(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.nll_loss(self.net(batch[0]), batch[1])

    result = treated(Unnormalized)
    assert result.verdict == "no_treatment_found"
    assert [one.fault for one in result.prescriptions] == ["not_log_probabilities"]
    assert "+            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])" in (
        result.prescriptions[0].patch
    )


def test_fault_of_code_is_prescribed_with_its_line() -> None:
    class Softmax(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]).softmax(1), batch[1])

    result = treated(Softmax)
    assert [one.fault for one in result.prescriptions] == ["softmax_before_loss"]
    assert result.verdict == "no_treatment_found"
    assert "no change of the network or of its training mends the cause" in result.evidence
    assert not result.trials
    place, _, line = result.prescriptions[0].place.rpartition(":")
    assert place.endswith("test_treat.py")
    assert "softmax(1)" in Path(__file__).read_text().splitlines()[int(line) - 1]
    assert "+            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])" in (
        result.prescriptions[0].patch
    )


def test_program_as_good_as_its_data_allow_is_healthy() -> None:
    class Noisy(Data):
        def __init__(self) -> None:
            super().__init__()
            for part in (self.training, self.validation):
                x, y = part.tensors
                drawn = torch.rand(len(y), generator=torch.Generator().manual_seed(1))
                part.tensors = x, torch.where(drawn < 0.4, (y + 1) % 4, y)

    result = treated(Net, Noisy())
    assert result.verdict == "healthy", result.evidence
    assert result.evidence.endswith("no change that was tried learns far more")
    assert len(result.trials) <= MAX_CANDIDATES, "nothing that promises little goes beyond a short trial"


def test_network_that_nothing_ails_has_no_treatment_and_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    class Weak(Data):
        """Values that are nearly noise."""

        def __init__(self) -> None:
            super().__init__()
            for part in (self.training, self.validation):
                x, _ = part.tensors
                drawn = torch.randn(len(x), generator=torch.Generator().manual_seed(len(x)))
                part.tensors = x, 0.3 * x[:, 0] + drawn

    class Line(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.mse_loss(self.net(batch[0])[:, 0], batch[1])

    lower = Candidate((Change("learning_rate", {"scale": 0.1}),), "a test")
    monkeypatch.setattr("lightning_gradguard.treatment.treat.candidates", lambda _: [lower])
    result = treated(partial(Line, rate=1e-3), Weak())
    assert result.verdict == "no_treatment_found"
    assert result.headline.endswith(
        "Line: nothing was found that ails it, nor what helps: nothing is changed"
    )
    assert result.evidence.endswith("; no cause was found, and its data may allow no more")
    assert text_of(result).endswith("report.html; no treatment.yaml was written")
    assert not (result.folder / "treatment.yaml").exists()
    with pytest.raises(UsageError, match=r"no such file. `treat` writes one only where it has found a treat"):
        read_config(str(result.folder / "treatment.yaml"))
    assert "No treatment.yaml was written." in (result.folder / "report.html").read_text()


def test_search_goes_on_in_the_time_of_a_verification_that_has_nothing_to_verify(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: list[float] = []

    def nothing(runner: TrialRunner, *args: Any) -> list[Trial]:
        runner.was_cut = True
        ends.append(args[2])
        return []

    monkeypatch.setattr("lightning_gradguard.treatment.treat.search", nothing)
    result = treated(deep_sigmoid, trainer={"max_steps": 40}, budget="10m")
    assert len(ends) == 2
    assert "the time for a search has ended, " in result.evidence
    assert (
        " s of 600 s, as the rest is for a verification, before a treatment was verified" in result.evidence
    )


def test_budget_that_ends_in_a_verification_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(treatment: Any, _: Any) -> Any:
        treatment.runner.was_cut = True
        one = Trial(job=Job((Change("initialize"),), 101, 40), curve=[(0, 1.4), (40, 0.4)])
        results = [SeedResult(one, one)]
        yield Verified(
            one.job.changes or (), results, "no_treatment_found", "1 of 3 fresh seeds were run", False
        )

    monkeypatch.setattr("lightning_gradguard.treatment.treat._Treatment._verified", cut)
    result = treated(deep_sigmoid, trainer={"max_steps": 40})
    assert "has ended, " in result.evidence
    assert result.evidence.endswith("before a treatment was verified")


def test_what_was_verified_and_failed_is_named_with_its_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = (Change("clipping", {"max_norm": 1.0}),)

    def run(seed: int, loss: float, steps: int) -> Trial:
        curve = [(0, 1.4), (20, loss), (steps, loss)]
        return Trial(job=Job(changes, seed, steps), curve=curve, over_constant=loss / 1.4)

    def cut(treatment: Any, _: Any) -> Any:
        treatment.runner.was_cut = True
        losses = {101: 0.2, 102: 0.3, 103: 1.35}
        results = [SeedResult(run(seed, 1.4, 30), run(seed, loss, 30)) for seed, loss in losses.items()]
        yield Verified(changes, results, *verdict_of(results, 40), False)

    monkeypatch.setattr("lightning_gradguard.treatment.treat._Treatment._verified", cut)
    result = treated(deep_sigmoid, trainer={"max_steps": 40})
    assert result.verdict == "no_treatment_found"
    assert "clipping(max_norm=1.0) was verified, and has not proved better: held-out losses: seed 101" in (
        result.evidence
    )
    assert "; not learned with seed 103: the held-out loss is 1.35, 0.964 times that of" in result.evidence
    assert result.evidence.endswith(". With a larger budget, runs are longer")
    assert len(result.verification) == 3


def test_best_of_several_that_are_better_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    def runs(scale: float, losses: list[float]) -> Verified:
        changes = (Change("learning_rate", {"scale": scale}),)
        results = [
            SeedResult(Trial(job=Job(None, seed, 40)), Trial(job=Job(changes, seed, 40), curve=[(40, loss)]))
            for seed, loss in enumerate(losses, 101)
        ]
        return Verified(changes, results, "better", f"a factor of {scale}", False)

    found = [runs(0.1, [0.40, 0.37, 0.39]), runs(0.3, [0.18, 0.14, 0.23]), runs(0.9, [0.1, 0.1, 0.9])]
    monkeypatch.setattr("lightning_gradguard.treatment.treat._Treatment._verified", lambda *_: iter(found))
    result = treated(deep_sigmoid, trainer={"max_steps": 40})
    assert result.verdict == "better"
    assert result.evidence == "a factor of 0.3"
    assert result.changes == found[1].changes


@pytest.mark.parametrize("steps", [40, 20])
def test_what_learns_with_some_seeds_alone_is_tried_at_a_lower_rate(
    monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """So it is after a search of the rate, and if the budget allows no whole runs."""
    clip = (Change("clipping", {"max_norm": 1.0}),)
    lower = (*clip, Change("learning_rate", {"scale": 0.1}))

    def run(changes: tuple[Change, ...], seed: int, loss: float) -> Trial:
        return Trial(job=Job(changes, seed, steps), curve=[(0, 1.4), (steps, loss)], over_constant=loss / 1.4)

    def others(_: Verification, first: Trial) -> list[SeedResult]:
        verified.append(first.job.changes or ())
        losses = {101: 0.2, 102: 0.2, 103: 0.2 if first.job.changes == lower else 1.35}
        return [SeedResult(run((), s, 1.4), run(first.job.changes or (), s, n)) for s, n in losses.items()]

    verified: list[tuple[Change, ...]] = []
    replaced: dict[str, Any] = {
        "candidates": lambda _: [],
        "search": lambda *_: [run(clip, 0, 0.2)],
        "with_needed_changes": lambda _, trial, *__, **___: trial,
        "at_best_rate": lambda _, trial, *__: [trial],
        "at_lower_rate": lambda *_, **__: [run(lower, 0, 0.2)],
    }
    for name, function in replaced.items():
        monkeypatch.setattr(f"lightning_gradguard.treatment.treat.{name}", function)
    monkeypatch.setattr(Verification, "first", lambda _, trial: run(trial.job.changes or (), 101, 0.2))
    monkeypatch.setattr(Verification, "others", others)
    result = treated(deep_sigmoid, trainer={"max_steps": 40})
    assert verified == [clip, lower]
    assert (result.verdict, result.changes) == ("cured" if steps == 40 else "better", lower)


class Late(Data):
    """A batch after the first has a sample of zeros."""

    def __init__(self) -> None:
        super().__init__()
        x, _ = self.training.tensors
        x[100] = 0.0

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(self.training, 32)


class Angles(Net):
    """Inputs of length 1, by a division that has no value at 0."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, labels = batch
        unit = x / x.norm(dim=1, keepdim=True)
        return nn.functional.cross_entropy(self.net(unit), labels)


class Asserting(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert batch[0].any(dim=1).all(), "a sample of zeros"
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("make", "fault", "line", "words"),
    [
        (Angles, "forward_pass", "unit = x / x.norm(", "x.norm(dim=1, keepdim=True)"),
        (
            Asserting,
            "exception_in_step",
            "assert batch[0]",
            "In batch 3: The step raised AssertionError: a sample of zeros",
        ),
    ],
)
def test_fault_that_a_later_batch_shows_is_prescribed_with_its_line(
    monkeypatch: pytest.MonkeyPatch, make: type[Net], fault: str, line: str, words: str
) -> None:
    monkeypatch.setattr("lightning_gradguard.treatment.treat.candidates", lambda _: [])
    result = treated(make, Late())
    found = result.prescriptions[0]
    assert found.fault == fault
    assert words in found.text
    place, _, number = found.place.rpartition(":")
    assert place.endswith("test_treat.py")
    assert line in Path(__file__).read_text().splitlines()[int(number) - 1]


def test_other_seeds_are_run_of_what_may_be_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost as much as all else: what fails with the first seed has them if nothing else is a cure."""
    failing, curing = (Change("add_residual"),), (Change("add_normalization"),)

    def run(changes: tuple[Change, ...], seed: int, loss: float) -> Trial:
        curve = [(0, 1.4), (60, loss), (90, loss)]
        return Trial(job=Job(changes, seed, 90), curve=curve, over_constant=loss / 1.4, is_likelihood=True)

    def first(_: Verification, trial: Trial) -> Trial:
        return run(trial.job.changes or (), 101, 1.2 if trial.job.changes == failing else 0.2)

    verified: list[tuple[Change, ...]] = []

    def others(_: Verification, trial: Trial) -> list[SeedResult]:
        verified.append(trial.job.changes or ())
        return []

    found = [run(changes, 0, 0.3) for changes in (failing, curing)]
    replaced: dict[str, Any] = {
        "candidates": lambda _: [],
        "search": lambda *_: found,
        "with_needed_changes": lambda _, trial, *__, **___: trial,
        "at_best_rate": lambda *_: [],
        "at_lower_rate": lambda *_, **__: [],
    }
    for name, function in replaced.items():
        monkeypatch.setattr(f"lightning_gradguard.treatment.treat.{name}", function)
    for method in (first, others):
        monkeypatch.setattr(Verification, method.__name__, method)
    treated(deep_sigmoid, trainer=SETTLING)
    assert verified == [curing, failing]


def test_candidates_behind_one_that_learns_are_tried_if_that_is_no_cure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A plain recurrence learns with some seeds, and is a GRU in each that learns with all."""
    offered = [Candidate((Change(kind),), "a test") for kind in ("add_residual", "add_normalization")]

    def run(job: Job, loss: float) -> Trial:
        return Trial(job=job, curve=[(0, 1.4), (90, loss)], over_constant=loss / 1.4, is_likelihood=True)

    def found(runner: TrialRunner, rest: Sequence[Candidate], *_: Any) -> list[Trial]:
        trial = run(runner.short_job(rest[0].changes, 0), 0.2)
        runner.log.add(trial)
        return [trial]

    def others(_: Verification, first: Trial) -> list[SeedResult]:
        losses = [0.2, 0.2, 1.35 if first.job.changes == offered[0].changes else 0.2]
        jobs = [Job(first.job.changes, 101 + i, 90) for i in range(3)]
        return [
            SeedResult(run(replace(job, changes=None), 1.4), run(job, loss))
            for job, loss in zip(jobs, losses, strict=True)
        ]

    replaced: dict[str, Any] = {
        "candidates": lambda _: offered,
        "search": found,
        "with_needed_changes": lambda _, trial, *__, **___: trial,
        "at_lower_rate": lambda *_, **__: [],
    }
    for name, function in replaced.items():
        monkeypatch.setattr(f"lightning_gradguard.treatment.treat.{name}", function)
    monkeypatch.setattr(Verification, "first", lambda _, trial: run(Job(trial.job.changes, 101, 90), 0.2))
    monkeypatch.setattr(Verification, "others", others)
    result = treated(deep_sigmoid, trainer={"max_steps": 90})
    assert (result.verdict, result.changes) == ("cured", offered[1].changes)


def test_operation_with_a_nonfinite_gradient_is_prescribed_and_no_change_cures_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Distances(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, labels = batch
            other = torch.cat([x[:1], -x[1:]])  # normalization over the batch keeps the equal rows apart
            gap = torch.sqrt((self.net(x) - self.net(other)).square().sum(1))
            return nn.functional.cross_entropy(self.net(x), labels) + 1e-3 * gap.mean()

    normalize = Candidate((Change("add_normalization"),), "a test")
    monkeypatch.setattr("lightning_gradguard.treatment.treat.candidates", lambda _: [normalize])
    result = treated(Distances)
    assert result.verdict == "better"
    assert result.changes == normalize.changes
    first = result.prescriptions[0]
    assert result.evidence.endswith(f". The fault of the code at {first.place} remains")
    place, _, line = first.place.rpartition(":")
    assert place.endswith("test_treat.py")
    assert "gap = torch.sqrt(" in Path(__file__).read_text().splitlines()[int(line) - 1]
    assert "use torch.sqrt((self.net(x) - self.net(other)).square().sum(1) + 1e-6)" in first.text
