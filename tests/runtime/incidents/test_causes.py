"""The cause, the place and the advice of faults in the code of a step, as reported for real programs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset, TensorDataset, random_split

from lightning_gradguard import LearningRateBackoff, NaNRollback, TrainingDiagnosis, TrainingDivergedError
from lightning_gradguard.core.forensics import Origin
from lightning_gradguard.runtime.incidents import investigation
from tests.tasks import Classifier, batches, fit, poisoned, weights

Step = Callable[[pl.LightningModule, Any], Tensor]
FILE = Path(__file__).name


class Network(pl.LightningModule):
    """A small network whose loss the test computes."""

    def __init__(self, step: Step, net: nn.Module | None = None, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = net or nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.criterion = EdgeLoss()
        self.step = step
        self.options = {"lr": 1e-2, **options}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(self, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), **self.options)


class EdgeLoss(nn.Module):
    """A loss of one's own: a mean of what a mask selects."""

    def forward(self, scores: Tensor, mask: Tensor) -> Any:
        return scores.square()[mask].mean()


def data(n: int = 8, bad: int = 5, outlier: float = 1.0, add: float = 0.0) -> list[Any]:
    """Batches of two views and a mask; in the bad one, row 2 is the same, or an outlier."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(n):
        x, y = torch.randn(2, 8, 6, generator=generator)
        mask = torch.full((8, 4), i != bad)
        if i == bad:
            y[2] = x[2]
            x[2] *= outlier
            x[2, 1] += add
        found.append((x, y, mask))
    return found


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


def line_of(function: Callable[..., Any], offset: int) -> str:
    return f"{FILE}:{function.__code__.co_firstlineno + offset} in {function.__name__}"


def angle(module: Any, batch: Any) -> Tensor:
    a, b = (F.normalize(module.net(x), dim=-1) for x in batch[:2])
    return torch.acos(1 - (a - b).square().sum(-1) / 2).sin().mean()


def variational(module: Any, batch: Any) -> Tensor:
    mu, log_variance = module.net(batch[0]).chunk(2, -1)
    z: Tensor = mu + (0.5 * log_variance).exp()
    kl: Tensor = (z.square() + log_variance.exp() - log_variance).mean()
    return kl


def masked(module: Any, batch: Any) -> Tensor:
    loss: Tensor = module.criterion(module.net(batch[0]), batch[2])
    return loss


def transcript(module: Any, batch: Any) -> Tensor:
    frames = module.net(batch[0])[:, None].expand(8, 5, 4).log_softmax(-1).transpose(0, 1)
    lengths = torch.where(batch[2][:, 0], 2, torch.tensor([2, 2, 5, 2, 2, 2, 2, 2]))
    return F.ctc_loss(frames, torch.ones(8, 5, dtype=torch.long), torch.full((8,), 5), lengths)


@pytest.mark.parametrize(
    ("step", "changes", "where", "cause", "words"),
    [
        (angle, {}, line_of(angle, 2), "backward_pass", ["acos", "clamp(-1 + 1e-6, 1 - 1e-6)", "row 2"]),
        (variational, {"outlier": 400.0}, line_of(variational, 2), "loss", ["exp", "clamp(max=20)", "row 2"]),
        (variational, {"outlier": 215.0}, line_of(variational, 3), "loss", ["exp", "clamp(max=20)", "row 2"]),
        (masked, {}, "criterion", "loss", ["empty selection", "numel()"]),
        (
            transcript,
            {},
            line_of(transcript, 3),
            "bad_input",
            ["longer than its input", "zero_infinity", "row 2"],
        ),
    ],
)
def test_operation_line_and_cure(
    tmp_path: Path, step: Step, changes: Any, where: str, cause: str, words: list[str]
) -> None:
    net = None
    if step is variational:
        net = nn.Sequential(nn.Linear(6, 4), nn.Hardtanh(-1e9, 1e9))
        torch.manual_seed(1)
        nn.init.normal_(net[0].weight, std=0.1)  # type: ignore[arg-type]
    module = Network(step, net, lr=1e-3)
    fit(module, data(**changes), [NaNRollback()], tmp_path)
    (found,) = incidents(tmp_path)
    assert (found["where"][0].endswith(where), found["cause"], found["step"]) == (True, cause, 5), found
    assert FILE in found["location"]
    text = f"{found['detail']} {found['advice']}"
    assert [word for word in words if word not in text] == []
    assert FILE in (tmp_path / found["dossier"] / "index.html").read_text()
    assert all(bool(w.isfinite().all()) for w in weights(module))


def test_epsilon_of_adam_in_half_precision(tmp_path: Path) -> None:
    def regression(module: Any, batch: Any) -> Tensor:
        loss: Tensor = module.net(batch[0]).float().square().mean() * 1e-3
        return loss

    batch: Any = [[t.half() for t in batch[:2]] for batch in data(20)]
    with pytest.raises(
        TrainingDivergedError, match=r"does not help against its cause \(optimizer epsilon\).*eps=1e-4"
    ):
        fit(Network(regression), batch, [NaNRollback(), LearningRateBackoff()], tmp_path, precision="16-true")
    found = incidents(tmp_path)
    causes = {i["cause"] for i in found if i["cause"]}
    assert causes == {"optimizer_epsilon"}
    assert sum(i["kind"] == "rollback" for i in found) == 2
    assert "eps=1e-08 is 0 in float16" in found[0]["detail"]
    fit(module := Network(regression, eps=1e-4), batch, [NaNRollback()], precision="16-true")
    assert all(bool(w.isfinite().all()) for w in weights(module))


def test_epsilon_of_adam_under_manual_optimization_and_deferred_checks(tmp_path: Path) -> None:
    class Manual(Network):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            optimizer: Any = self.optimizers()
            loss: Tensor = self.net(batch[0]).float().square().mean() * 1e-3
            self.manual_backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return loss

    module = Manual(masked)
    module.automatic_optimization = False
    batch: Any = [[t.half() for t in batch[:2]] for batch in data(20)]
    with pytest.raises(TrainingDivergedError, match=r"\(optimizer epsilon\).*eps=1e-4"):
        fit(module, batch, [NaNRollback(check="deferred")], tmp_path, precision="16-true")


def test_schedule_that_is_nonfinite(tmp_path: Path) -> None:
    def factor(step: int) -> float:
        return 1.0 if step < 10 else math.nan

    class Scheduled(Network):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    with pytest.raises(TrainingDivergedError, match="a rollback does not help"):
        fit(Scheduled(squares), data(40), [NaNRollback(), LearningRateBackoff()], tmp_path)
    found = incidents(tmp_path)
    assert {i["cause"] for i in found if i["cause"]} == {"nonfinite_learning_rate"}
    assert found[0]["where"][0].endswith(f"{FILE}:{factor.__code__.co_firstlineno} in factor")
    assert [i["kind"] for i in found].count("learning_rate_backoff") == 0


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_schedule_that_is_nonfinite_once(tmp_path: Path, check: Any) -> None:
    class Scheduled(Network):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            schedule = LambdaLR(optimizer, lambda step: math.inf if step == 6 else 1.0)
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    fit(module := Scheduled(squares), data(20, bad=-1), [NaNRollback(check=check)], tmp_path)
    assert {i["cause"] for i in incidents(tmp_path) if i["cause"]} == {"nonfinite_learning_rate"}
    assert all(bool(w.isfinite().all()) for w in weights(module))


def test_weights_that_have_grown_are_not_blamed_for_a_batch_that_fails_without_it(tmp_path: Path) -> None:
    fit(Network(masked, lr=0.2), data(), [NaNRollback()], tmp_path)
    (found,) = incidents(tmp_path)
    assert (found["where"], found["cause"]) == (["criterion"], "loss"), found
    assert "empty selection" in found["advice"]
    assert "learning rate" not in found["advice"]


def gated(module: Any, batch: Any) -> Tensor:
    """A loss of 0, with gradients of 0, in the bad batch."""
    loss: Tensor = squares(module, batch) * batch[2].all()
    return loss


class Normed(torch.optim.Optimizer):
    """An optimizer of one's own that normalizes gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad / p.grad.norm() * self.defaults["lr"] if p.grad is not None else 0.0)
        return loss


class WithOwnOptimizer(Network):
    def configure_optimizers(self) -> Any:
        return Normed(self.parameters(), {"lr": 1e-3})


class WithHook(Network):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad.div_(p.grad.norm())  # type: ignore[union-attr]


class WithClipping(Network):
    def configure_gradient_clipping(self, optimizer: Any, *arguments: Any, **options: Any) -> None:
        for p in self.parameters():
            p.grad = p.grad / p.grad.norm()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [WithOwnOptimizer, WithHook, WithClipping])
def test_code_around_the_optimizers_step_that_divides_by_a_gradient_of_0_is_named(
    kind: type[Network], tmp_path: Path
) -> None:
    fit(module := kind(gated), data(), [NaNRollback(patience=2), LearningRateBackoff()], tmp_path)
    found = incidents(tmp_path)
    assert (found[0]["cause"], found[0]["step"]) == ("optimizer_step", 6)
    assert FILE in found[0]["location"]
    assert "p.grad.norm().clamp_min(1e-6)" in found[0]["advice"]
    assert {i["kind"] for i in found[1:]} == {"nonfinite_weights", "rollback"}
    assert all(bool(w.isfinite().all()) for w in weights(module))


class Counting(WithHook):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: Any
        self.register_buffer("steps", torch.zeros(()))
        self.calls: list[int] = []

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps += 1
        self.calls.append(len(self.calls))
        super().on_before_optimizer_step(optimizer)


def test_a_trial_of_a_hook_leaves_nothing_of_what_it_writes() -> None:
    fit(module := Counting(gated), data(), [NaNRollback()])
    fit(twin := Counting(gated), data(), [NaNRollback(max_dossiers=0)])
    assert module.calls == twin.calls
    assert module.steps == twin.steps


@pytest.mark.parametrize("kind", [WithHook, WithClipping])
def test_hooks_that_need_gradients_do_not_end_the_run_in_a_skipped_step(kind: type[Network]) -> None:
    def undefined(module: Any, batch: Any) -> Tensor:
        loss: Tensor = squares(module, batch) / batch[2].any()
        return loss

    fit(module := kind(undefined), data(), [rollback := NaNRollback()])
    assert rollback.skips == 1
    assert not {"on_before_optimizer_step", "configure_gradient_clipping"} & vars(module).keys()


def test_weight_decay_that_enlarges_weights_is_named(tmp_path: Path) -> None:
    class Decaying(Network):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=50.0)

    fit(module := Decaying(squares), data(20, bad=99), [NaNRollback(), TrainingDiagnosis()], tmp_path)
    found = incidents(tmp_path)
    named = {i["kind"]: i for i in found}
    assert "multiplies weights by -4 in each step" in named["divergence"]["advice"]
    assert named["exploding_gradient"]["cause"] == "weight_decay"
    assert "vanishing_weights" not in named
    assert all(bool(w.isfinite().all()) for w in weights(module))


def test_usual_weight_decay_at_a_rate_far_too_high_is_not_at_fault(tmp_path: Path) -> None:
    class Fast(Network):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e6)

    with pytest.raises(TrainingDivergedError, match="Lower the learning rate") as error:
        fit(Fast(squares), data(20, bad=99), [NaNRollback(max_rollbacks=1)], tmp_path)
    assert "weight_decay:" not in str(error.value)


def test_weights_that_are_nonfinite_from_the_start_are_no_update(tmp_path: Path) -> None:
    module = Network(squares)
    with torch.no_grad():
        module.get_parameter("net.2.bias").fill_(torch.nan)
    with pytest.raises(TrainingDivergedError, match="were nonfinite before the first step") as error:
        fit(module, data(20, bad=99), [NaNRollback()], tmp_path)
    assert "Give net.2.bias values before training" in str(error.value)
    found = incidents(tmp_path)
    assert found[0]["cause"] == "corrupted_weights"
    assert not [i for i in found if "learning rate" in i["advice"]]


def test_a_rollback_of_corrupted_weights_is_no_reason_for_a_lower_rate(tmp_path: Path) -> None:
    class Written(Network):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                with torch.no_grad():
                    self.get_parameter("net.2.weight")[0, 0] = 1e38

    fit(Written(squares), data(20, bad=99), [NaNRollback(patience=1)], tmp_path)
    found = {i["kind"]: i for i in incidents(tmp_path)}
    assert found["rollback"]["cause"] == "corrupted_weights"
    assert found["rollback"]["advice"] == "The weights are those of an earlier step."


@pytest.mark.parametrize(("value", "cause"), [(3e38, "corrupted_weights"), (0.0, "update_too_large")])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_weights_that_the_gradients_of_sgd_cannot_have_moved_are_no_update(
    tmp_path: Path, momentum: float, value: float, cause: str
) -> None:
    class Written(Network):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4 and value:
                self.get_parameter("net.weight").data.fill_(value)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-2 if value else 1e4, momentum=momentum)

    module = Written(squares, linear())
    fit(module, data(20, bad=99), [NaNRollback(patience=1, max_rollbacks=99)], tmp_path)
    found = incidents(tmp_path)
    assert found[0]["cause"] == cause
    if value:
        assert "farther than SGD can move it" in found[0]["detail"]
        assert not [i for i in found if "lower the learning rate" in i["advice"].lower()]


def test_parameter_at_the_edge_of_a_domain_is_trained_as_its_logarithm(tmp_path: Path) -> None:
    def likelihood(module: Any, batch: Any) -> Tensor:
        loss: Tensor = module.net(batch[0]).abs().mean() + (module.scale.log() + batch[1].sum() * 0)
        return loss

    def cured(module: Any, batch: Any) -> Tensor:
        loss: Tensor = module.net(batch[0]).abs().mean() + torch.exp(module.scale).log()
        return loss

    def with_scale(step: Step) -> Network:
        module = Network(step, lr=1e-1)
        module.scale = nn.Parameter(torch.tensor(0.15))
        return module

    fit(with_scale(likelihood), data(), [NaNRollback()], tmp_path)
    found = incidents(tmp_path)[0]
    assert "`scale` is trained" in found["advice"]
    assert "torch.exp(self.scale)" in found["advice"]
    fit(module := with_scale(cured), data(), [rollback := NaNRollback()])
    assert (rollback.skips, bool(module.state_dict()["scale"] < 0)) == (0, True)


def test_hook_that_changes_the_batch_or_gradients_is_named(tmp_path: Path) -> None:
    class Standardizing(Network):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] / batch[2][:, :1], *batch[1:]]

    class Normalizing(Network):
        def on_after_backward(self) -> None:
            for p in self.parameters():
                p.grad = None if p.grad is None else p.grad / p.grad.norm()

    def partial(module: Any, batch: Any) -> Tensor:
        loss: Tensor = squares(module, batch) * batch[2].all()
        return loss

    line = Normalizing.on_after_backward.__code__.co_firstlineno + 2
    for module, cause, words in (
        (Standardizing(squares), "bad_input", "as on_after_batch_transfer of the module returned it"),
        (Normalizing(partial), "backward_pass", f"{FILE}:{line} in on_after_backward: `p.grad = None"),
    ):
        fit(module, data(), [NaNRollback(incident_dir=str(tmp_path / cause))], tmp_path)
        (found,) = incidents(tmp_path / cause)
        assert found["cause"] == cause
        assert words in found["detail"]


def test_a_fault_of_one_step_alone_is_found_again(tmp_path: Path) -> None:
    """The batch runs again at the step that it was served at."""

    def warmed_up(module: Any, batch: Any) -> Tensor:
        loss: Tensor = squares(module, batch) / module.global_step
        return loss

    fit(Network(warmed_up), data(), [NaNRollback()], tmp_path)
    (found,) = incidents(tmp_path)
    assert (found["step"], found["cause"]) == (0, "loss")
    assert "The divisor is 0" in found["advice"]


class Normalizing(Network):
    """Divides each gradient by its norm, which is 0 in a bad batch, under manual optimization."""

    bound = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(squares(self, batch) * batch[2].all())
        for p in self.net.parameters():
            assert p.grad is not None
            p.grad /= p.grad.norm().clamp_min(self.bound)
        optimizer.step()


@pytest.mark.parametrize("bound", [0.0, 1e-6])
def test_gradients_that_a_step_divides_by_their_norm(tmp_path: Path, bound: float) -> None:
    module = Normalizing(squares)
    module.automatic_optimization, module.bound = False, bound
    fit(module, data(), [NaNRollback()], tmp_path)
    if bound:
        assert not (tmp_path / "incidents.jsonl").exists()
        return
    (found,) = incidents(tmp_path)
    assert (found["cause"], found["where"]) == ("backward_pass", [found["location"]])
    assert "`p.grad /= p.grad.norm().clamp_min(self.bound)`" in found["detail"]
    assert "(self.bound).clamp_min(1e-6)" in found["advice"]
    assert all(bool(p.isfinite().all()) for p in module.parameters())


def test_loss_that_is_never_finite_stops_with_its_reason(tmp_path: Path) -> None:
    def logarithm(module: Any, batch: Any) -> Tensor:
        scores: Tensor = module.net(batch[0])
        return (scores * 0).log().mean()

    with pytest.raises(TrainingDivergedError) as raised:
        fit(Network(logarithm), data(40), [NaNRollback()], tmp_path)
    first = str(raised.value).splitlines()[0]
    assert first.startswith("No step was ever finite. aten::log in the step's own code given")
    assert f"{FILE}:{logarithm.__code__.co_firstlineno + 2} in logarithm" in first
    assert [i["kind"] for i in incidents(tmp_path)].count("rollback") == 2


def test_a_bad_start_of_the_data_is_survived() -> None:
    module, rollback = Classifier(), NaNRollback()
    fit(module, poisoned(batches(20), nan=range(8)), [rollback])
    assert (rollback.skips, rollback.rollbacks) == (8, 2)


def compiled(module: Any, batch: Any) -> Tensor:
    loss: Tensor = module.net(batch[0]).square().mean()
    return loss if bool(batch[2].all()) else loss * module.options["compiled"](loss)


@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_only_the_compiled_code_is_nonfinite(tmp_path: Path) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(out * math.inf * 0 for out in graph(*args))

    def one(loss: Tensor) -> Tensor:
        return loss * 0 + 1

    module = Network(compiled)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=1e-3)  # type: ignore[method-assign]
    module.options["compiled"] = torch.compile(one, backend=backend)
    fit(module, data(), [NaNRollback()], tmp_path)
    (found,) = incidents(tmp_path)
    assert (found["cause"], found["step"]) == ("compiled_code", 5)
    assert "torch.compile" in found["advice"]


def gaussian(module: Any, batch: Any) -> Tensor:
    mu, sigma = module.net(batch[0]).chunk(2, -1)
    normal = torch.distributions.Normal(mu, F.softplus(sigma), validate_args=True)
    loss: Tensor = -normal.log_prob(batch[1][:, :2]).mean()
    return loss


def labels(module: Any, batch: Any) -> Tensor:
    return F.cross_entropy(module.net(batch[0]), batch[2])


def asserting(module: Any, batch: Any) -> Tensor:
    loss: Tensor = module.net(batch[0]).square().mean()
    assert loss < 1e3, "the loss is too large"
    return loss


def wrong_label(batch: Any, i: int) -> Any:
    target = torch.arange(8) % 4
    if i == 5:
        target[2] = 7
    return batch[0], batch[1], target


def squares(module: Any, batch: Any) -> Tensor:
    loss: Tensor = module.net(batch[0]).square().mean()
    return loss


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


RAISING = [
    (gaussian, [(x, y, m) for x, y, m in data(add=math.nan)], "batch[0] holds nonfinite values in row 2"),
    (
        labels,
        [wrong_label(b, i) for i, b in enumerate(data())],
        "batch[2] holds 7 in row 2, which is not within 0 to 3",
    ),
    (asserting, data(outlier=1e5), "the loss is too large"),
]


@pytest.mark.parametrize(("step", "batch", "words"), RAISING)
def test_exception_is_examined_and_passes(tmp_path: Path, step: Step, batch: list[Any], words: str) -> None:
    net = linear() if step is asserting else None
    with pytest.raises((ValueError, IndexError, AssertionError)):
        fit(Network(step, net), batch, [NaNRollback()], tmp_path)
    (found,) = incidents(tmp_path)
    assert (found["kind"], found["step"]) == ("exception_in_step", 5)
    assert words in found["detail"]
    assert (tmp_path / found["dossier"] / "dossier.pt").is_file()
    assert "last_good.ckpt" in found["advice"]
    before = Network(step, None if net is None else linear())
    fit(before, batch[:5])
    saved = torch.load(tmp_path / "last_good.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], value) for name, value in before.state_dict().items())


@pytest.mark.parametrize(("step", "batch", "words"), RAISING)
def test_invalid_batches_are_skipped_if_told_so(
    tmp_path: Path, step: Step, batch: list[Any], words: str
) -> None:
    def trained(data: list[Any], **options: Any) -> Network:
        module = Network(step, linear() if step is asserting else None)
        fit(module, data, [NaNRollback(**options)], tmp_path)
        return module

    module = trained(batch, skip_invalid_batches=True)
    (found,) = incidents(tmp_path)
    assert (found["kind"], found["action"]) == ("nonfinite_loss", "skipped")
    assert words in found["detail"]
    assert "training_step" not in vars(module)
    twin = trained([b for i, b in enumerate(batch) if i != 5])
    assert all(map(torch.equal, weights(module), weights(twin)))


def test_a_skipped_step_that_raised_for_an_unknown_reason_has_the_exception_as_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another rank, which had other data, finds nothing in them."""

    def with_other_rank(own: Any) -> list[Any]:
        other = Origin("transient", detail="finite") if isinstance(own, Origin) else own
        return [own, other]

    def unreadable(module: Any, batch: Any) -> Tensor:
        if module.global_step == 5:
            raise ValueError("unknown speaker")
        return squares(module, batch)

    monkeypatch.setattr(investigation, "gather_objects", with_other_rank)
    fit(Network(unreadable), data(), [NaNRollback(skip_invalid_batches=True)], tmp_path)
    (found,) = incidents(tmp_path)
    assert (found["action"], found["cause"]) == ("skipped", "unknown")
    assert found["advice"].startswith("The step raised ValueError: unknown speaker, at ")


@pytest.mark.parametrize("repeats", [True, False])
def test_any_exception_of_a_step_after_good_ones_is_an_incident(tmp_path: Path, repeats: bool) -> None:
    raised: list[int] = []

    def lost(module: Any, batch: Any) -> Tensor:
        if module.global_step == 5 and (repeats or not raised):
            raised.append(module.global_step)
            raise KeyError("speaker")
        return squares(module, batch)

    with pytest.raises(KeyError):
        fit(Network(lost), data(bad=99), [NaNRollback()], tmp_path)
    (found,) = incidents(tmp_path)
    assert (found["kind"], found["step"], found["cause"]) == ("exception_in_step", 5, "unknown")
    assert found["detail"].startswith("The step raised KeyError: 'speaker', at ")
    assert " in lost" in found["location"]
    assert found["advice"] == f"Training can be resumed from {tmp_path / 'last_good.ckpt'}."


@pytest.mark.parametrize("first", [0, 3])
def test_batches_are_not_offered_to_be_skipped_where_the_network_is_at_fault(
    tmp_path: Path, first: int
) -> None:
    def negative(module: Any, batch: Any) -> Tensor:
        scale = module.net(batch[0]).square() + (0.1 if module.global_step < first else -9.0)
        normal: Any = torch.distributions.Normal(0.0, scale, validate_args=True)
        loss: Tensor = -normal.log_prob(scale.detach()).mean()
        return loss

    with pytest.raises(ValueError, match="scale"):
        fit(Network(negative), data(bad=99), [NaNRollback()], tmp_path)
    (found,) = incidents(tmp_path)
    assert "softplus" in found["advice"]
    assert ("skip_invalid_batches" in found["advice"]) == (first > 0)


def test_a_mistake_in_the_code_leaves_nothing(tmp_path: Path) -> None:
    def mistaken(module: Any, batch: Any) -> Tensor:
        loss: Tensor = module.net(batch[1][0]).unknown()
        return loss

    with pytest.raises(AttributeError):
        fit(Network(mistaken), data(), [NaNRollback(skip_invalid_batches=True)], tmp_path)
    assert not (tmp_path / "incidents.jsonl").exists()


def test_single_grown_elements_of_small_tensors_are_no_corruption() -> None:
    from lightning_gradguard.core.forensics import OutOfRange, origin_in_weights

    assert origin_in_weights({"bias": OutOfRange(1, 1, 14.0)}).cause == "update_too_large"
    assert origin_in_weights({"head.weight": OutOfRange(2, 64, 14.0)}).cause == "update_too_large"
    # the range of optimizer state is far above what updates reach
    assert origin_in_weights({"sum of weight": OutOfRange(1, 640, 16.7)}).cause == "corrupted_weights"
    assert origin_in_weights({"sum of weight": OutOfRange(9, 640, 16.7)}).cause == "update_too_large"
    both = origin_in_weights({"bias": OutOfRange(1, 1, math.inf)})
    assert "corrupted memory looks the same" in both.detail


@pytest.mark.parametrize(
    ("growth", "cause"),
    [(9.98e33, "corrupted_weights"), (1e29, "update_too_large"), (math.inf, "update_too_large")],
)
def test_one_element_is_corruption_where_other_tensors_follow_it(growth: float, cause: str) -> None:
    from lightning_gradguard.core.forensics import OutOfRange, origin_in_weights

    # a flipped moment of the critic, after which the generator stepped through it
    followed = OutOfRange(25, 640, math.inf if growth == math.inf else 6.83e28)
    critic = {"critic.weight": OutOfRange(1, 640, growth), "momentum_buffer": OutOfRange(1, 640, 743.0)}
    assert origin_in_weights({"generator.weight": followed, **critic}).cause == cause


def test_index_of_a_subset_is_that_in_its_data_set(tmp_path: Path) -> None:
    x, y, mask = map(torch.cat, zip(*data(), strict=True))
    x[21, 3] = math.nan
    half = random_split(TensorDataset(x, y, mask), [0.5, 0.5], torch.Generator().manual_seed(0))
    nested = Subset(next(part for part in half if 21 in part.indices), range(len(x) // 2))
    fit(
        Network(squares), [], [NaNRollback()], tmp_path, loader=DataLoader(nested, batch_size=8, shuffle=True)
    )
    (incident,) = incidents(tmp_path)
    assert "(index in the data set: 21)" in incident["detail"]


@pytest.mark.parametrize(("workers", "persists"), [(0, False), (1, False), (1, True)])
def test_index_in_the_data_set_is_told_where_the_sampler_has_it(
    tmp_path: Path, workers: int, persists: bool
) -> None:
    x, y, mask = map(torch.cat, zip(*data(), strict=True))
    x[21, 3] = math.nan
    options: dict[str, Any] = {"num_workers": workers, "persistent_workers": persists}
    loader = DataLoader(TensorDataset(x, y, mask), batch_size=8, shuffle=True, **options)
    sampler = loader.batch_sampler
    module, rollback = Network(squares), NaNRollback()
    fit(module, [], [rollback], tmp_path, loader=loader, max_epochs=3)
    details = [i["detail"] for i in incidents(tmp_path)]
    assert len(details) == 3
    # with a worker, batches of the first epoch may be asked for before the fit starts
    assert all("(index in the data set: 21)" in detail for detail in details[workers:])
    assert loader.batch_sampler is sampler
    twin = Network(squares)
    loader = DataLoader(TensorDataset(x, y, mask), batch_size=8, shuffle=True, **options)
    fit(twin, [], [NaNRollback(max_dossiers=0)], loader=loader, max_epochs=3)
    assert all(map(torch.equal, weights(module), weights(twin)))


class WithoutMessageError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("this exception has no message")


def test_an_exception_without_a_message_is_raised_as_it_is(tmp_path: Path) -> None:
    class Raising(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise WithoutMessageError
            loss: Tensor = self.layer(batch[0]).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    trainer = pl.Trainer(
        max_epochs=1,
        callbacks=[NaNRollback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        default_root_dir=tmp_path,
    )
    with pytest.raises(WithoutMessageError):
        trainer.fit(Raising(), DataLoader(TensorDataset(torch.randn(10, 2))))
