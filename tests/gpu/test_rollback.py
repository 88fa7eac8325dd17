"""A rollback on a GPU is exact: its random numbers, and snapshots that are copied during training."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor

from lightning_gradguard import AdaptiveGradientClipping, Incident, NaNRollback
from lightning_gradguard.core.snapshots import Snapshot
from tests.gpu.tasks import Network, Observer, everything, finite, fit_there
from tests.tasks import NOT_A_NUMBER, Batch, StateRecorder, batches, insert, same

#: Clock ticks for which a copy is held up, some 20 ms: many steps of these networks.
LATE = 40_000_000


@pytest.fixture
def slow_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each copy to pinned memory begins long after the training that goes on beside it."""
    copy_out = Snapshot._copy_out

    def late(snapshot: Snapshot, targets: list[Tensor], sources: list[Tensor]) -> None:
        if snapshot._device == "cpu":
            snapshot._stream = snapshot._stream or torch.cuda.Stream()
            with torch.cuda.stream(snapshot._stream):
                torch.cuda._sleep(LATE)
        copy_out(snapshot, targets, sources)

    monkeypatch.setattr(Snapshot, "_copy_out", late)


def exact(**arguments: Any) -> NaNRollback:
    return NaNRollback(**{"restore_rng": True, "rewind_schedulers": True, **arguments})


def storm_and_twin(optimizer: str, rollback: NaNRollback) -> tuple[pl.Trainer, pl.Trainer]:
    """A run that rolls back from step 34 to step 20, and one without the lost batches."""
    clean = batches(60)
    networks = [Network(optimizer, dropout=0.3, decay=0.97) for _ in range(2)]
    clipping = [AdaptiveGradientClipping() for _ in range(2)]
    trainer = fit_there(networks[0], insert(clean, 31, *[NOT_A_NUMBER] * 3), [rollback, clipping[0]])
    assert (rollback.skips, rollback.rollbacks) == (3, 1)
    # the newest snapshot with ten good steps behind it is that of step 20
    return trainer, fit_there(networks[1], [*clean[:20], *clean[31:]], [clipping[1]])


@pytest.mark.parametrize("snapshot_device", ["cpu", "same"])
@pytest.mark.parametrize("optimizer", ["sgd fused", "adam", "adamw fused", "adam capturable"])
def test_rollback_is_exact(optimizer: str, snapshot_device: Any) -> None:
    rollback = exact(snapshot_every_n_steps=10, snapshot_device=snapshot_device)
    trainer, twin = storm_and_twin(optimizer, rollback)
    assert same(everything(trainer), everything(twin))


@pytest.mark.usefixtures("slow_copies")
def test_rollback_is_exact_with_late_copies() -> None:
    trainer, twin = storm_and_twin("adamw fused", exact(snapshot_every_n_steps=10))
    assert same(everything(trainer), everything(twin))


@pytest.mark.usefixtures("slow_copies")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_snapshot_holds_what_was_there_when_it_was_taken(accumulate: int) -> None:
    """The first batch of the step writes buffers right afterwards, and its last one writes weights."""

    recorder = StateRecorder()
    data = insert(batches(60 * accumulate), 31 * accumulate, *[NOT_A_NUMBER] * 3 * accumulate)
    arguments = {"accumulate_grad_batches": accumulate}
    fit_there(Network(), data, [recorder, NaNRollback(snapshot_every_n_steps=10)], **arguments)
    assert recorder.restored is not None
    step, restored = recorder.restored
    assert step == 20
    assert same(restored, recorder.at[20])
    assert not same(restored, recorder.at[21])


@pytest.mark.usefixtures("slow_copies")
def test_bad_first_step_is_not_attributed_to_weights_in_copy() -> None:
    """The investigation compares weights with a snapshot, on the host, a moment after that was taken."""
    causes = []

    class Odd(Network):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            return (loss - loss.detach() - 1).log() if len(batch[1]) == 7 else loss

        def on_training_incident(self, trainer: Any, module: Any, incident: Incident) -> None:
            causes.append(incident.cause)

    clean, rollback = batches(20), NaNRollback()
    odd = (clean[0][0][:7], clean[0][1][:7])
    trainer = fit_there(Odd(), [odd, *clean], [rollback])
    assert causes == ["loss"]
    assert same(everything(trainer), everything(fit_there(Network(), clean)))


@pytest.mark.parametrize("optimizer", ["sgd fused", "adam", "adamw fused", "adam capturable"])
def test_deferred_equals_exact_and_a_run_without_the_lost_batches(optimizer: str) -> None:
    clean, after = batches(20), batches(1, seed=4)[0]
    trainers = []
    for check, more in (("exact", [NOT_A_NUMBER]), ("deferred", [NOT_A_NUMBER, after]), ("exact", [])):
        rollback = exact(check=check)
        network = Network(optimizer, dropout=0.3, decay=0.97)
        trainers.append(fit_there(network, insert(clean, 9, *more), [rollback]))
        assert (rollback.skips, rollback.rollbacks) == (len(more) > 0, 0)
    at_once, late, twin = map(everything, trainers)
    assert same(at_once, twin)
    assert same(late, twin)
    assert finite(trainers[1])


@pytest.mark.usefixtures("slow_copies")
def test_deferred_rollback_is_exact() -> None:
    """Three bad steps, each seen one batch late, lose six batches, and those since the snapshot."""
    clean, after = batches(60), batches(3, seed=4)
    lost = [batch for pair in zip([NOT_A_NUMBER] * 3, after, strict=True) for batch in pair]
    rollback, observer = exact(check="deferred", snapshot_every_n_steps=10), Observer()
    network = Network(dropout=0.3, decay=0.97)
    trainer = fit_there(network, insert(clean, 31, *lost), [rollback, observer])
    assert (rollback.skips, rollback.rollbacks) == (3, 1)
    # a step is known to be good one step later, so that snapshots are of steps 11 and 22
    assert observer.restored == [11]
    twin = fit_there(Network(dropout=0.3, decay=0.97), [*clean[:11], *clean[31:]])
    assert same(everything(trainer), everything(twin))
