"""Changes are made before the optimizers, once, and are in checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_gradguard import (
    Change,
    InitializationCheck,
    LearningRateBackoff,
    NaNRollback,
    Treatment,
    default_callbacks,
)
from lightning_gradguard.callbacks.defaults import callbacks_of
from tests.core.remedies.networks import mlp, networks
from tests.launching import launch
from tests.tasks import (
    Batch,
    exponential_averages,
    fit,
    optimizer_state,
    plain_loader,
    same,
    weights,
)

STRUCTURE = [
    Change("replace_activation", {"to": "gelu"}),
    Change("add_normalization"),
    Change("add_residual"),
    Change("standardize_input"),
    Change("initialize", {"to": "lsuv"}),
]
OPTIMIZERS = [
    Change("learning_rate", {"scale": 0.1}),
    Change("warm_up", {"steps": 7}),
    Change("weight_decay", {"value": 0.05}),
    Change("epsilon", {"value": 1e-3}),
]


class Trained(pl.LightningModule):
    def __init__(self, network: str = "mlp", fails_early: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: Any = mlp(nn.Sigmoid) if network == "mlp" else networks()[network][0]
        self.fails_early = fails_early

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        inputs, target = batch
        loss = nn.functional.cross_entropy(self.net(inputs), target)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def batches(n: int, network: str = "mlp") -> list[Batch]:
    inputs = networks()[network][1]
    generator = torch.Generator().manual_seed(0)
    return [(inputs + 0.1 * i, torch.randint(3, (len(inputs),), generator=generator)) for i in range(n)]


def module(network: str = "mlp") -> Trained:
    torch.manual_seed(0)
    return Trained(network)


@pytest.mark.parametrize("network", networks())
def test_every_kind_of_network_trains_with_all_changes(network: str) -> None:
    changed = module(network)
    names = [name for name, _ in changed.named_parameters() if ".rnn." not in name]
    changes = [*STRUCTURE, Change("rnn_to_gru"), Change("orthogonal_recurrent"), Change("gate_bias")]
    trainer = fit(changed, batches(3, network), [Treatment([*changes, *OPTIMIZERS])])
    assert set(names) <= {name for name, _ in changed.named_parameters()}
    stepped = {p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert stepped == set(changed.parameters())
    assert all(bool(p.isfinite().all()) for p in changed.parameters())


def test_a_change_that_fits_nothing_leaves_the_run_as_it_is_bit_for_bit() -> None:
    torch.manual_seed(3)
    plain, changed = module(), module()
    for each, callbacks in ((plain, []), (changed, [Treatment([Change("rnn_to_gru"), Change("gate_bias")])])):
        torch.manual_seed(3)
        fit(each, batches(4), callbacks)
    assert same(weights(plain), weights(changed))


def test_what_is_done_to_the_optimizers() -> None:
    rates = []

    class Watch(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer = fit(module(), batches(3), [Treatment(OPTIMIZERS), Watch()])
    (group,) = trainer.optimizers[0].param_groups
    assert group["weight_decay"] == 0.05
    assert group["eps"] == 1e-3
    assert group["initial_lr"] == pytest.approx(0.005)
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [pytest.approx(0.005)]
    assert rates[0] == pytest.approx(0.005)
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    "form",
    [
        lambda optimizer, schedule: {"optimizer": optimizer, "lr_scheduler": schedule},
        lambda optimizer, schedule: ([optimizer], [{"scheduler": schedule, "interval": "step"}]),
        lambda optimizer, schedule: [[optimizer], [schedule]],
    ],
)
def test_a_constant_rate_is_that_before_the_schedule(form: Any) -> None:
    rates = []

    class Scheduled(Trained):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return form(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1e-3))

        def on_train_batch_end(self, *_: Any) -> None:
            rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    trainer = fit(Scheduled(), batches(2), [Treatment([Change("constant_rate")])])
    assert rates == [0.1, 0.1]
    assert not trainer.lr_scheduler_configs


def test_the_warm_up_is_of_steps() -> None:
    def weight_after_one_step(changes: list[Change]) -> Tensor:
        trained = module()
        before = trained.net[0].weight.detach().clone()
        fit(trained, batches(1), [Treatment(changes)])
        moved: Tensor = trained.net[0].weight.detach() - before
        return moved

    whole = weight_after_one_step([Change("learning_rate", {"scale": 0.1})])
    warm = weight_after_one_step([Change("warm_up", {"steps": 10})])
    torch.testing.assert_close(warm, whole)


def checkpointed(path: Path, n_epochs: int, changes: list[Change], ckpt_path: Path | None = None) -> Any:
    trained = module()
    resumed = None if ckpt_path is None else str(ckpt_path)
    trainer = fit(trained, batches(4), [Treatment(changes)], ckpt_path=resumed, max_epochs=n_epochs)
    trainer.save_checkpoint(path)
    return trainer, trained


def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path) -> None:
    changes = [*STRUCTURE, *OPTIMIZERS]
    trainer, whole = checkpointed(tmp_path / "whole", 3, changes)
    checkpointed(tmp_path / "half", 1, changes)
    resumed_trainer, resumed = checkpointed(tmp_path / "rest", 3, changes, tmp_path / "half")
    assert same(weights(whole), weights(resumed))
    assert same(optimizer_state(trainer), optimizer_state(resumed_trainer))
    rates = [t.optimizers[0].param_groups[0]["lr"] for t in (trainer, resumed_trainer)]
    assert rates[0] == rates[1]


def test_the_changed_module_is_loaded_from_its_checkpoint(tmp_path: Path) -> None:
    trainer, trained = checkpointed(tmp_path / "a.ckpt", 1, STRUCTURE)
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    inputs = batches(1)[0][0]
    for name in ("a.ckpt", "weights.ckpt"):
        loaded = Treatment.load_from_checkpoint(tmp_path / name, Trained)
        assert type(loaded) is Trained
        assert same(weights(loaded), weights(trained))
        assert torch.equal(loaded.eval().net(inputs), trained.eval().net(inputs))
    unchanged = module()
    trainer.validate(unchanged, plain_loader(batches(1)), str(tmp_path / "a.ckpt"), verbose=False)
    assert same(weights(unchanged), weights(trained))


def test_a_checkpoint_without_the_changes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plain.ckpt"
    checkpointed(path, 1, [])
    with pytest.raises(ValueError, match=r"no Treatment has changed: use Trained\.load_from_checkpoint"):
        Treatment.load_from_checkpoint(path, Trained)
    with pytest.raises(MisconfigurationException, match="add_normalization.*with no change of this kind"):
        checkpointed(tmp_path / "more", 2, [Change("add_normalization")], path)


def test_a_module_is_changed_once(capsys: pytest.CaptureFixture[str]) -> None:
    trained = module()
    fit(trained, batches(2), [Treatment(STRUCTURE)])
    assert "Changed the module before training" in capsys.readouterr().err
    names = list(trained.state_dict())
    treatment = Treatment(STRUCTURE)
    fit(copy.deepcopy(trained), batches(2), [treatment])
    fit(trained, batches(2), [treatment])
    assert list(trained.state_dict()) == names
    assert "Changed the module" not in capsys.readouterr().err


@pytest.mark.parametrize("is_treated", [False, True])
def test_the_check_advises_nothing_against_a_treatment(
    is_treated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = module()
    with torch.no_grad():
        [*trained.parameters()][-2].mul_(1e4)
    treatment = [Treatment([Change("learning_rate", {"scale": 1e-3})])] if is_treated else []
    fit(trained, batches(2), [*treatment, InitializationCheck()])
    printed = capsys.readouterr().err
    assert "loss_over_guessing" in printed
    assert ("cure" in printed) == (not is_treated)


def test_layers_that_are_made_late_are_changed() -> None:
    class Late(Trained):
        def setup(self, stage: str) -> None:
            self.tail = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

        def configure_model(self) -> None:
            if len(self.net) < 13:
                self.net.append(nn.Tanh())
                self.net.append(self.tail)

    late = Late()
    fit(late, batches(2), [Treatment([Change("replace_activation")])])
    kinds = [type(child).__name__ for child in late.modules()]
    assert "Sigmoid" not in kinds
    assert "Tanh" not in kinds


@pytest.mark.parametrize("first", [True, False])
def test_every_order_beside_the_suite_gives_the_same_weights(first: bool) -> None:
    def run(first: bool) -> list[Tensor]:
        treatment = Treatment([*STRUCTURE, *OPTIMIZERS])
        suite = default_callbacks(
            nan_rollback=NaNRollback(snapshot_every_n_steps=1), learning_rate_backoff=LearningRateBackoff()
        )
        trained = module()
        torch.manual_seed(0)
        data = batches(8)
        data[4] = (data[4][0] * float("nan"), data[4][1])
        fit(trained, data, [treatment, *suite] if first else [*suite, treatment])
        return weights(trained)

    assert same(run(first), run(True))


def test_a_module_whose_step_needs_the_fit_is_changed_by_its_structure() -> None:
    class Fails(Trained):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            if not self.trainer.optimizers:
                raise RuntimeError("not yet")
            return super().training_step(batch, batch_idx)

    fails = Fails()
    with pytest.warns(UserWarning, match=r"could not run a training batch .*RuntimeError: not yet"):
        fit(fails, batches(2), [Treatment([Change("replace_activation")])])
    assert type(fails.net[1]) is nn.ReLU
    with (
        pytest.warns(UserWarning, match="not yet"),
        pytest.raises(MisconfigurationException, match=r"cannot make initialize\(to=lsuv\)"),
    ):
        fit(Fails(), batches(2), [Treatment([Change("initialize", {"to": "lsuv"})])])


def test_callbacks_of_all_kinds() -> None:
    changes = [*STRUCTURE, *OPTIMIZERS, Change("clipping"), Change("weight_norm"), Change("precision")]
    callbacks = callbacks_of(changes)
    assert [type(callback).__name__ for callback in callbacks] == [
        "Treatment",
        "AdaptiveGradientClipping",
        "WeightNormConstraint",
    ]
    fit(module(), batches(2), callbacks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"kind": "cliping"}], "kind='cliping' must be one of"),
        ([Change("clipping", {"max_norm": 2.0})], r"does not make clipping\(max_norm=2\.0\): callbacks_of"),
    ],
)
def test_wrong_changes(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Treatment(changes)


@pytest.mark.parametrize("first", [True, False])
def test_averages_of_weights_are_of_the_changed_module(first: bool) -> None:
    trained = module()
    treatment = Treatment([Change("add_normalization"), Change("add_residual")])
    averages: list[Any] = [pl.callbacks.StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
    averages = [*averages, *exponential_averages()][-1:]
    fit(trained, batches(3), [treatment, *averages] if first else [*averages, treatment], max_epochs=2)
    shapes = [parameter.shape for parameter in averages[0]._average_model.parameters()]
    assert shapes == [parameter.shape for parameter in trained.parameters()]


RANKS = """
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from lightning_gradguard import Change, Treatment
from tests.callbacks.test_treatment import OPTIMIZERS, STRUCTURE, Trained, batches
from tests.tasks import plain_loader


class Sharded(Trained):
    def train_dataloader(self):
        size = 16 - 12 * dist.get_rank()  # a batch that is too small to be normalized by
        return plain_loader([(x[:size] + dist.get_rank(), y[:size]) for x, y in batches(3)])


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = Sharded()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Treatment([*STRUCTURE, *OPTIMIZERS])], use_distributed_sampler=False,
    )
    trainer.fit(module)
    torch.save(dict(module.named_parameters()), Path(sys.argv[1]) / f"rank{trainer.global_rank}.pt")
    dist.barrier()  # who leaves early takes the connection away from the other
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_ranks_make_the_same_changes(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(RANKS)
    launch([str(script), str(tmp_path)])
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
