"""The six callbacks in any Trainer: every way to run one, duck-typed neighbours, steps by hand."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

from lightning_gradguard import NaNRollback, default_callbacks
from lightning_gradguard.callbacks.defaults import DEFAULTS
from tests.tasks import Batch, Classifier, batches, fit, plain_loader, poisoned, same, weights

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
BAD = poisoned(batches(12), nan=[5, 7, 8, 9])


class Validated(Classifier):
    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("val_loss", loss)
        return loss

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.net(batch[0])


class Manual(Validated):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.step(batch)

    def step(self, batch: Batch) -> None:
        optimizer: Any = self.optimizers()
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


# -- neighbours of any kind


class Duck:
    """A callback, or a logger, without Lightning's base class, that has every method."""

    state_key = "Duck"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def state_dict(self) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("kind", [Mock, MagicMock, Duck])
def test_duck_typed_callbacks(kind: Any) -> None:
    other = kind()
    if kind is not Duck:
        other.state_dict.return_value = {}
    rollback = NaNRollback(patience=2)
    module = Classifier("adam fused")
    fit(module, BAD, [other, *default_callbacks(nan_rollback=rollback)])
    assert (rollback.skips, rollback.rollbacks) == (4, 1)


@pytest.mark.parametrize("folder", [True, False])
def test_mocks_of_a_logger(folder: bool, tmp_path: Path) -> None:
    logger = Mock()
    if folder:
        logger.save_dir = logger.log_dir = str(tmp_path / "logs")
    fit(Classifier(), BAD, default_callbacks(), tmp_path, logger=logger, log_every_n_steps=1)
    assert logger.log_metrics.call_count
    (file,) = tmp_path.rglob("incidents.jsonl")
    assert file == tmp_path / ("logs" if folder else "") / "incidents.jsonl"


class Plain:
    """A logger by its methods alone."""

    name, version, save_dir, log_dir, group_separator = "plain", 3, None, None, "/"
    root_dir = None

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...
    def log_graph(self, *_: Any) -> None: ...
    def save(self) -> None: ...
    def finalize(self, status: str) -> None: ...
    def after_save_checkpoint(self, _: Any) -> None: ...


def test_a_logger_without_lightnings_base() -> None:
    logger = Plain()
    fit(Classifier(), BAD, default_callbacks(), logger=logger, log_every_n_steps=1)
    assert "grad_norm/total" in logger.metrics
    assert logger.metrics["rollback/skips"] == 4


def test_a_replaced_save_checkpoint_is_called_and_stays(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        max_epochs=1,
        default_root_dir=tmp_path,
        callbacks=[pl.callbacks.ModelCheckpoint(tmp_path), *default_callbacks()],
        **{**QUIET, "enable_checkpointing": True},
    )
    trainer.save_checkpoint = mine = Mock()  # type: ignore[method-assign]
    trainer.fit(Classifier(), plain_loader(batches(3)))
    assert mine.call_count == 1
    assert trainer.save_checkpoint is mine


# -- outside of a fit


def hooks(callback: pl.Callback, trainer: pl.Trainer, module: Any, optimizer: Any) -> Iterator[str]:
    """Calls every hook of a callback, in alphabetical order, and yields its name."""
    values = {
        "optimizer": optimizer,
        "loss": torch.zeros(()),
        "batch": batches(1)[0],
        "batch_idx": 0,
        "outputs": None,
        "stage": "validate",
        "exception": ValueError(),
        "checkpoint": {},
        "dataloader_idx": 0,
    }
    for name, hook in inspect.getmembers(pl.Callback, inspect.isfunction):
        if name.startswith("on_") or name in ("setup", "teardown"):
            names = list(inspect.signature(hook).parameters)[3:]
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                getattr(callback, name)(trainer, module, *(values[n] for n in names))
            yield name


@pytest.mark.parametrize("name", DEFAULTS)
@pytest.mark.parametrize("when", ["before", "after", "after an exception"])
def test_every_hook_outside_of_a_fit(name: str, when: str) -> None:
    """In no order at all: nothing happens, and nothing is written."""
    callback, module = DEFAULTS[name](), Manual()
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], **QUIET)
    optimizer = module.configure_optimizers()
    if when != "before":
        data = batches(3) if when == "after" else [*batches(2), "no batch"]
        try:
            trainer.fit(module, plain_loader(data))  # type: ignore[arg-type]
        except TypeError:
            assert when == "after an exception"
        optimizer = trainer.optimizers[0]
    before, state = weights(module), copy.deepcopy(callback.state_dict())
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    called = list(hooks(callback, trainer, module, optimizer))
    assert len(called) > 30
    assert same(weights(module), before)
    assert str(callback.state_dict()) == str(state)
    assert all(bool(p.grad.isnan().all()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("fails", [False, True])
def test_steps_by_hand_after_a_fit(fails: bool) -> None:
    """They are those of a run without the suite; a fit that follows is guarded again."""
    bare, module = Manual(), Manual()
    rollback = NaNRollback(patience=2)
    guarded = pl.Trainer(
        max_epochs=1,
        **QUIET,
        callbacks=default_callbacks(nan_rollback=rollback, adaptive_gradient_clipping=None),
    )
    for trainer, one in ((pl.Trainer(max_epochs=1, **QUIET), bare), (guarded, module)):
        data: Any = [*batches(4), "no batch"] if fails else batches(4)
        if fails:
            with pytest.raises(TypeError):
                trainer.fit(one, plain_loader(data))
        else:
            trainer.fit(one, plain_loader(data))
        for batch in batches(3, seed=1):
            one.step(batch)
    assert same(weights(bare), weights(module))
    guarded.fit_loop.max_epochs = 3
    guarded.fit(module, plain_loader(poisoned(batches(6), nan=[3])))
    assert rollback.skips >= 1
    assert all(bool(tensor.isfinite().all()) for tensor in weights(module))


class StepsAtTheEnd(Manual):
    def on_train_end(self) -> None:
        self.step(batches(1)[0])


def test_steps_in_the_modules_last_hooks() -> None:
    module = StepsAtTheEnd()
    fit(module, batches(4), default_callbacks())


# -- any way to run a Trainer


class Endless(IterableDataset[Batch]):
    def __iter__(self) -> Iterator[Batch]:
        yield from batches(6)


class NoneAtTimes(Validated):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        return None if batch_idx % 2 else super().training_step(batch, batch_idx)


class Combined(Validated):
    def training_step(self, batch: dict[str, Batch], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return super().training_step(batch["a"], batch_idx)


def loader(n: int = 6) -> DataLoader[Batch]:
    return plain_loader(batches(n))


WAYS: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"trainer": {"fast_dev_run": True}},
    "fast_dev_run=3": {"trainer": {"fast_dev_run": 3}},
    "overfit_batches": {"trainer": {"overfit_batches": 2}},
    "max_steps=0": {"trainer": {"max_steps": 0}},
    "max_epochs=0": {"trainer": {"max_epochs": 0}},
    "no training batches": {"trainer": {"limit_train_batches": 0}},
    "an empty loader": {"data": [], "warns": ".*(zero length|Total length of)"},
    "reloaded": {"trainer": {"reload_dataloaders_every_n_epochs": 1}},
    "accumulated": {"trainer": {"accumulate_grad_batches": 4}},
    "barebones": {"trainer": {"barebones": True, "logger": None}, "warns": ".*barebones"},
    "no loss": {"module": NoneAtTimes, "warns": ".*returned `None`"},
    "an iterable data set": {"loader": lambda: DataLoader(Endless(), batch_size=None)},
    "a combined loader": {
        "module": Combined,
        "loader": lambda: CombinedLoader({"a": loader(), "b": loader(3)}, "max_size_cycle"),
    },
    "manual": {"module": Manual},
    "several validations": {"trainer": {"val_check_interval": 2}},
    "logs each step": {"trainer": {"log_every_n_steps": 1}},
    "float64": {"trainer": {"precision": "64-true"}},
    "bfloat16": {"trainer": {"precision": "bf16-mixed"}},
    "detects anomalies": {"trainer": {"detect_anomaly": True}},
    "by time": {"trainer": {"max_time": "00:00:10:00"}},
}


@pytest.mark.parametrize(
    ("way", "check"), [*((way, "deferred") for way in WAYS), ("no loss", "exact"), ("accumulated", "exact")]
)
def test_ways_to_run(way: str, check: Any) -> None:
    """Weights are those without the suite, and a second fit, a validation and a test follow."""
    found = []
    for callbacks in (
        [],
        default_callbacks(nan_rollback=NaNRollback(check=check), adaptive_gradient_clipping=None),
    ):
        case = WAYS[way]
        module = case.get("module", Validated)()
        arguments = {**QUIET, "max_epochs": 2, **case.get("trainer", {})}
        with warnings.catch_warnings():
            if "warns" in case:
                warnings.filterwarnings("ignore", case["warns"])
            trainer = pl.Trainer(callbacks=callbacks, **{k: v for k, v in arguments.items() if v is not None})
            for _ in range(2):
                data = case.get("loader", lambda case=case: plain_loader(case.get("data", batches(6))))()
                trainer.fit(module, data, loader(2))
            if way != "barebones":
                trainer.validate(module, loader(2), verbose=False)
                trainer.test(module, loader(2), verbose=False)
                trainer.predict(module, loader(2))
        found.append([*weights(module), torch.tensor(trainer.global_step)])
    assert same(*found)


def test_validation_alone() -> None:
    trainer = pl.Trainer(callbacks=default_callbacks(), **QUIET)
    assert trainer.validate(Validated(), loader(2), verbose=False)
    assert trainer.test(Validated(), loader(2), verbose=False)
    assert trainer.predict(Validated(), loader(2))


def test_one_set_of_callbacks_in_several_fits() -> None:
    rollback = NaNRollback()
    callbacks = default_callbacks(nan_rollback=rollback)
    for seed in range(2):
        trainer = fit(Classifier(seed=seed), BAD, callbacks)
        assert trainer.global_step == 12
        assert rollback.skips == 4, "the counts of a run are its own"


class Stops(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, i: int) -> None:
        trainer.should_stop = i == 3


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_should_stop(check: Any) -> None:
    rollback = NaNRollback(check=check)
    trainer = fit(
        Classifier(), poisoned(batches(8), nan=[3]), [*default_callbacks(nan_rollback=rollback), Stops()]
    )
    assert trainer.global_step == 4
    assert rollback.skips == 1


RAISED_IN = [
    "setup",
    "on_fit_start",
    "on_sanity_check_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
    "teardown",
]


@pytest.mark.parametrize(
    ("hook", "first"), [*((hook, True) for hook in RAISED_IN), *((hook, False) for hook in RAISED_IN[::4])]
)
def test_an_exception_in_a_hook(hook: str, first: bool) -> None:
    """It reaches the user as it is, leaves no hook, and the next fit of the same Trainer is guarded."""

    class Raises(pl.Callback):
        is_armed = True

    def act(self: Raises, *_: Any, **__: Any) -> None:
        if self.is_armed:
            raise ZeroDivisionError(hook)

    setattr(Raises, hook, act)
    raises, rollback = Raises(), NaNRollback()
    own = default_callbacks(nan_rollback=rollback)
    callbacks = [raises, *own] if first else [*own, raises]
    trainer = pl.Trainer(max_epochs=4, callbacks=callbacks, log_every_n_steps=1, **QUIET)
    module, data = Validated(), DataLoader(TensorDataset(*batches(1, size=128)[0]), batch_size=32)
    with pytest.raises(ZeroDivisionError, match=f"^{hook}$"):
        trainer.fit(module, data, loader(2))
    assert type(data.batch_sampler) is BatchSampler
    hooks = [(o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks) for o in trainer.optimizers]
    assert not any(before or after for before, after in hooks)
    raises.is_armed = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, plain_loader(poisoned(batches(4), nan=[2])), loader(2))
    assert rollback.skips >= 1 or hook in ("teardown", "on_fit_end", "on_train_end")
    assert all(bool(tensor.isfinite().all()) for tensor in weights(module))


@pytest.mark.parametrize("name", DEFAULTS)
def test_callbacks_can_be_copied_and_pickled(name: str) -> None:
    """Fresh, and after a fit, whose Trainer they do not keep."""
    callback = DEFAULTS[name]()
    for _ in range(2):
        for other in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            fit(Classifier(), BAD, [other], log_every_n_steps=1)
            assert len(pickle.dumps(other)) < 100_000
        fit(Classifier(), BAD, [callback], log_every_n_steps=1)
