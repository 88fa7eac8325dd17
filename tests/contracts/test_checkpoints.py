"""Nothing nonfinite is ever written to disk, and a stopped run can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import Tensor

from lightning_gradguard import NaNRollback, TrainingDivergedError
from tests.tasks import (
    Classifier,
    ResumableLoader,
    batches,
    exponential_averages,
    fit,
    poisoned,
    same,
    weights,
)

CHECKS = pytest.mark.parametrize("check", ["exact", "deferred"])


def tensors_of(file: Path) -> list[Tensor]:
    content = torch.load(file, weights_only=False)
    states = [content["state_dict"], content.get("current_model_state", {})]
    found = [t for state in states for t in state.values()]
    for optimizer in content["optimizer_states"]:
        found += [v for s in optimizer["state"].values() for v in s.values() if isinstance(v, Tensor)]
    return [t for t in found if t.is_floating_point()]


def assert_finite(folder: Path) -> list[str]:
    files = sorted(folder.rglob("*.ckpt"))
    for file in files:
        assert all(bool(t.isfinite().all()) for t in tensors_of(file)), file.name
    return [file.name for file in files]


class Outside(pl.Callback):
    """Makes something nonfinite at the end of some batches, just before checkpoints are written."""

    def __init__(self, corrupt: Callable[[pl.Trainer, Any], Any], *steps: int) -> None:
        self.corrupt = corrupt
        self.steps = steps

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if trainer.global_step in self.steps:
            with torch.no_grad():
                self.corrupt(trainer, module)


class Keep(OnExceptionCheckpoint):
    """Does not delete its file."""

    def teardown(self, *_: Any, **__: Any) -> None:
        """Keeps the file."""


CORRUPTIONS: dict[str, Callable[[pl.Trainer, Any], Any]] = {
    "one weight": lambda t, m: m.net[4].weight[3, 3].fill_(math.nan),
    "all weights": lambda t, m: [p.fill_(math.inf) for p in m.parameters()],
    "a running mean": lambda t, m: m.net[1].running_mean[0].fill_(math.nan),
    "optimizer state": lambda t, m: t.optimizers[0].state[m.net[0].bias]["exp_avg"][0].fill_(math.inf),
}


@CHECKS
@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_state_corrupted_by_another_callback_is_not_saved(
    tmp_path: Path, check: Any, corruption: str
) -> None:
    module, rollback = Classifier("adam", norm=True), NaNRollback(check=check, snapshot_every_n_steps=5)
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, save_last=True)
    outside = Outside(CORRUPTIONS[corruption], 7, 30)
    fit(module, batches(40), [rollback, keep, outside], tmp_path, enable_checkpointing=True)
    assert len(assert_finite(tmp_path)) == 41
    assert rollback.rollbacks == 2
    assert all(bool(t.isfinite().all()) for t in weights(module))


@CHECKS
def test_checkpoint_at_the_end_of_the_epoch_is_checked(tmp_path: Path, check: Any) -> None:
    keep = ModelCheckpoint(tmp_path, save_last=True)
    outside = Outside(CORRUPTIONS["one weight"], 10)
    fit(
        Classifier("adam", norm=True),
        batches(10),
        [NaNRollback(check=check), outside, keep],
        tmp_path,
        enable_checkpointing=True,
    )
    assert assert_finite(tmp_path) == ["epoch=0-step=10.ckpt", "last.ckpt"]


@CHECKS
@pytest.mark.parametrize("corrupted_by", ["outside", "a batch"])
@pytest.mark.filterwarnings(
    "ignore:.*was called without a model", "ignore:.*no last checkpoint available", "ignore:.*ckpt_path=None"
)
def test_what_is_saved_on_an_exception_is_finite(tmp_path: Path, check: Any, corrupted_by: str) -> None:
    class Breaks(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 12:
                raise RuntimeError("out of luck")

    module = Classifier("adam", norm=True)
    by_batch = corrupted_by == "a batch"
    outside = Outside(CORRUPTIONS["all weights"], *(() if by_batch else (12,)))
    data = poisoned(batches(20), nan=[11] if by_batch else [])
    callbacks = [outside, NaNRollback(check=check), Breaks(), *exponential_averages(), Keep(tmp_path)]
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, data, callbacks, enable_checkpointing=True)
    assert assert_finite(tmp_path) == ["on_exception.ckpt"]


@CHECKS
def test_manual_checkpoint_is_checked(tmp_path: Path, check: Any) -> None:
    class ByHand(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step in (5, 6):
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    module = Classifier("adam", norm=True)
    data = poisoned(batches(10), nan=[4])
    fit(module, data, [Outside(CORRUPTIONS["one weight"], 6), ByHand(), NaNRollback(check=check)])
    assert assert_finite(tmp_path) == ["5.ckpt", "6.ckpt"]


def test_outside_of_a_fit_checkpoints_are_the_trainer_s_own(tmp_path: Path) -> None:
    module, rollback = Classifier("adam", norm=True), NaNRollback()
    trainer = fit(module, batches(5), [rollback])
    with torch.no_grad():
        module.net[0].get_parameter("weight").fill_(math.nan)
    trainer.save_checkpoint(tmp_path / "nonfinite.ckpt")
    assert not all(bool(t.isfinite().all()) for t in tensors_of(tmp_path / "nonfinite.ckpt"))
    assert rollback.rollbacks == 0


@CHECKS
def test_a_stopped_run_leaves_a_checkpoint_that_can_be_resumed(tmp_path: Path, check: Any) -> None:
    n_bad = 40
    data = poisoned(batches(120), nan=range(31, 31 + n_bad))
    module = Classifier("adam", norm=True)
    rollback = NaNRollback(check=check, max_rollbacks=1, snapshot_every_n_steps=10)
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)
    with pytest.raises(TrainingDivergedError, match="last_good.ckpt"):
        fit(
            module,
            data,
            [rollback, keep],
            tmp_path,
            loader=ResumableLoader(data),
            enable_checkpointing=True,
        )
    assert "last_good.ckpt" in assert_finite(tmp_path)
    saved = torch.load(tmp_path / "last_good.ckpt", weights_only=False)["state_dict"]
    assert same(list(saved.values()), list(module.state_dict().values()))

    clean = batches(120)
    resumed, again = Classifier("adam", norm=True, seed=5), NaNRollback(check=check, max_rollbacks=5)
    trainer = fit(
        resumed,
        clean,
        [again, ModelCheckpoint(tmp_path / "kept", every_n_train_steps=5, save_top_k=-1)],
        tmp_path,
        enable_checkpointing=True,
        ckpt_path=str(tmp_path / "last_good.ckpt"),
        loader=ResumableLoader(clean),
    )
    assert again.skips == rollback.skips
    assert trainer.global_step == 120
    assert not same(list(saved.values()), list(resumed.state_dict().values()))
    assert all(bool(t.isfinite().all()) for t in weights(resumed))


@CHECKS
def test_run_that_stops_while_it_saves_is_stopped(tmp_path: Path, check: Any) -> None:
    module, rollback = Classifier("adam", norm=True), NaNRollback(check=check, max_rollbacks=0)
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=1, save_top_k=-1)
    outside = Outside(CORRUPTIONS["all weights"], 7)
    with pytest.raises(TrainingDivergedError):
        fit(module, batches(20), [rollback, outside, keep], tmp_path, enable_checkpointing=True)
    assert "last_good.ckpt" in assert_finite(tmp_path)
    assert all(bool(t.isfinite().all()) for t in weights(module))


@CHECKS
def test_a_healthy_run_writes_the_files_of_a_bare_one(tmp_path: Path, check: Any) -> None:
    contents = []
    for name, guards in (("bare", []), ("guarded", [NaNRollback(check=check)])):
        keep = ModelCheckpoint(tmp_path / name, every_n_train_steps=4, save_top_k=-1)
        fit(Classifier("adam", norm=True), batches(12), [*guards, keep], enable_checkpointing=True)
        files = sorted((tmp_path / name).glob("*.ckpt"))
        contents.append(([f.name for f in files], [t for f in files for t in tensors_of(f)]))
    assert contents[0][0] == contents[1][0]
    assert same(contents[0][1], contents[1][1])
