"""Between logged steps the host never synchronizes (deferred), or once a step (exact)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from lightning_gradguard import (
    AdaptiveGradientClipping,
    ClippingPolicy,
    GlobalNormClipping,
    NaNRollback,
    PercentileClipping,
    PerTensorClipping,
    UnitwiseClipping,
    default_callbacks,
)
from tests.gpu.tasks import DEVICE, Network, fit_there
from tests.tasks import Batch, batches

#: Batches within which everything is made that is made once: state, memory, handles of libraries.
WARM_UP = 20
N = 60
#: Steps between those that are logged, where one transfer to the host is the point of it.
LOGGED = 10

# torch warns once of the mode that these tests set
pytestmark = pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")


@pytest.fixture(autouse=True)
def _default_mode() -> Iterator[None]:
    """A test that fails leaves the mode as it was in the middle of a step."""
    yield
    torch.cuda.set_sync_debug_mode("default")


class Watch(pl.Callback):
    """Watches whole batches, from the first callback's start to the last one's end.

    First in the list, it begins ahead of the other callbacks; the module's own hook, by which it ends, comes
    after theirs. Between the two, Lightning itself never synchronizes: batches are on the device already, and
    `self.log` keeps tensors until a logged step. The last batch of an epoch counts as logged.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.watched = 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= WARM_UP and (batch_idx + 1) % LOGGED and not trainer.is_last_batch:
            self.watched += 1
            torch.cuda.set_sync_debug_mode(self.mode)

    def on_exception(self, *_: Any) -> None:
        """Handlers of an exception may synchronize, and must not hide the traceback."""
        torch.cuda.set_sync_debug_mode("default")


class Watched(Network):
    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


def there(n: int) -> list[Batch]:
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches(n)]


def run(
    network: Network, watch: Watch, check: Any, clipping: AdaptiveGradientClipping | None = None
) -> NaNRollback:
    rollback = NaNRollback(check=check, snapshot_every_n_steps=5)
    clipping = clipping or AdaptiveGradientClipping()
    suite = [watch, *default_callbacks(nan_rollback=rollback, adaptive_gradient_clipping=clipping)]
    # deterministic kernels may synchronize where the default ones do not
    fit_there(network, there(N), suite, log_every_n_steps=LOGGED, deterministic=False)
    assert watch.watched == 36
    assert rollback.skips == 0
    return rollback


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "sgd fused", "adam", "adamw fused", "adam capturable"])
def test_deferred_never_synchronizes(optimizer: str, norm: bool) -> None:
    run(Watched(optimizer, norm=norm, dropout=0.1, decay=0.99), Watch("error"), "deferred")


@pytest.mark.parametrize(
    "policy", [GlobalNormClipping, PercentileClipping, UnitwiseClipping, PerTensorClipping]
)
def test_deferred_never_synchronizes_with_any_policy(policy: Callable[[], ClippingPolicy]) -> None:
    clipping = AdaptiveGradientClipping(policy(), exclude=["net.6"])
    run(Watched("sgd fused"), Watch("error"), "deferred", clipping)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
def test_exact_synchronizes_once_a_step(optimizer: str, norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronizations: list[str] = []
    by_step: list[int] = []
    synchronize = torch.cuda.Event.synchronize

    # the mode does not see events, by which the suite synchronizes
    def counted(event: torch.cuda.Event) -> None:
        synchronizations.append("event")
        synchronize(event)

    class Counted(Watched):
        def on_train_batch_end(self, *_: Any) -> None:
            super().on_train_batch_end()
            if watch.watched > len(by_step):
                operations = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
                by_step.append(len(synchronizations) + len(operations))
            synchronizations.clear()
            caught.clear()

    monkeypatch.setattr(torch.cuda.Event, "synchronize", counted)
    watch = Watch("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(Counted(optimizer, norm=norm), watch, "exact")
    assert by_step == [1] * 36
