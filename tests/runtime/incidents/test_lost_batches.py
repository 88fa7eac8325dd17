"""The log of lost batches: batches, reasons, and their omission in a resumed run."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_gradguard import NaNRollback
from lightning_gradguard.core.snapshots.ring import PATIENCE
from lightning_gradguard.runtime.incidents.lost_batches import RECOGNIZED_BY, LostBatches
from tests.tasks import (
    Batch,
    Classifier,
    Listener,
    ResumableLoader,
    batches,
    fit,
    plain_loader,
    poisoned,
    same,
    weights,
)

LOG = "lost_batches.rank0.jsonl"
FAST: dict[str, Any] = {"snapshot_every_n_steps": 5, "max_dossiers": 0}


class ByName(Classifier):
    """Gets batches that say which samples they hold."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step((batch["x"], batch["y"]), batch_idx)


def named(data: Sequence[Batch], key: str = "id") -> list[Any]:
    return [{"x": x, "y": y, key: torch.arange(100 * i, 100 * i + len(x))} for i, (x, y) in enumerate(data)]


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_skipped_batch_is_logged_with_its_samples(tmp_path: Path) -> None:
    data = named(poisoned(batches(10), nan=[6]))
    fit(ByName(), data, [NaNRollback()], tmp_path)
    (record,) = records(tmp_path)
    fingerprint = record.pop("fingerprint")
    assert record == {
        "epoch": 0,
        "batch_idx": 6,
        "reason": "skipped",
        "step": 6,
        "samples": list(range(600, 632)),
    }
    assert math.isfinite(fingerprint)


def test_rollback_loses_the_batches_since_the_snapshot(tmp_path: Path) -> None:
    data = named(poisoned(batches(40), nan=[25, 26, 27]))
    rollback = NaNRollback(snapshot_every_n_steps=10)
    fit(ByName(), data, [rollback], tmp_path)
    assert rollback.rollbacks == 1
    logged = {(r["batch_idx"], r["reason"]): r["samples"] for r in records(tmp_path)}
    # the newest snapshot with ten good steps behind it is that of step 10
    skipped = {(i, "skipped") for i in (25, 26, 27)}
    assert set(logged) == skipped | {(i, "undone") for i in range(10, 25)}
    assert len(records(tmp_path)) == len(logged)
    assert all(samples == list(range(100 * i, 100 * i + 32)) for (i, _), samples in logged.items())


def test_batches_of_later_epochs_are_distinguished(tmp_path: Path) -> None:
    fit(Classifier(), poisoned(batches(6), nan=[4]), [NaNRollback(**FAST)], tmp_path, max_epochs=3)
    assert [(r["epoch"], r["batch_idx"]) for r in records(tmp_path)] == [(0, 4), (1, 4), (2, 4)]
    assert len({r["fingerprint"] for r in records(tmp_path)}) == 1


@pytest.mark.parametrize("max_dossiers", [0, 10])
def test_under_accumulation_the_window_is_logged(tmp_path: Path, max_dossiers: int) -> None:
    data = poisoned(batches(12), nan=[5])
    fit(Classifier(), data, [NaNRollback(max_dossiers=max_dossiers)], tmp_path, accumulate_grad_batches=4)
    assert [r["batch_idx"] for r in records(tmp_path)] == [4, 5, 6, 7]


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_under_lbfgs_the_batch_is_logged(tmp_path: Path, line_search: str | None) -> None:
    class Lbfgs(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn=line_search)

    fit(Lbfgs(), poisoned(batches(8, size=128), nan=[3]), [NaNRollback(**FAST)], tmp_path)
    assert [r["batch_idx"] for r in records(tmp_path)] == [3]


def resume(
    folder: Path, served: Sequence[Batch], callbacks: Sequence[pl.Callback] = (), **arguments: Any
) -> tuple[Classifier, NaNRollback]:
    """Go on from the checkpoint of step 20."""
    module, rollback = Classifier("adam", norm=True, seed=3), NaNRollback(**{**FAST, **arguments})
    fit(
        module,
        served,
        [rollback, ModelCheckpoint(folder, every_n_train_steps=20, save_top_k=-1), *callbacks],
        folder / "again",
        ckpt_path=str(folder / "epoch=0-step=20.ckpt"),
        loader=ResumableLoader(served),
        enable_checkpointing=True,
    )
    return module, rollback


def first_run(folder: Path, served: Sequence[Batch]) -> None:
    keep = ModelCheckpoint(folder, every_n_train_steps=20, save_top_k=-1)
    fit(
        Classifier("adam", norm=True),
        served,
        [NaNRollback(**FAST), keep],
        folder,
        loader=ResumableLoader(served),
        enable_checkpointing=True,
    )


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_resumed_run_omits_lost_batches(tmp_path: Path, check: Any) -> None:
    """Batches that were undone are finite, and are left out for what they led to."""
    clean = batches(40)
    first_run(tmp_path, poisoned(clean, nan=[30, 31, 32]))
    undone = [r["batch_idx"] for r in records(tmp_path) if r["reason"] == "undone"]
    assert undone == list(range(undone[0], 30))
    assert undone[0] >= 15
    lost = {*undone, 30, 31, 32}
    later = {i for i in lost if i >= 20}
    listener = Listener()
    module, rollback = resume(tmp_path, poisoned(clean, nan=[30, 31, 32]), [listener], check=check)
    assert rollback.skips == 3
    assert [i.kind for i in listener.found] == ["lost_batch"] * len(later)
    assert {i.batch_idx for i in listener.found} == later
    # as if only the others had been served
    expected = Classifier("adam", norm=True, seed=3)
    kept = [b for i, b in enumerate(clean) if i not in later]
    (tmp_path / LOG).unlink()
    fit(
        expected,
        kept,
        [NaNRollback(**FAST), ModelCheckpoint(tmp_path, every_n_train_steps=20, save_top_k=-1)],
        tmp_path / "twin",
        ckpt_path=str(tmp_path / "epoch=0-step=20.ckpt"),
        loader=ResumableLoader(kept),
        enable_checkpointing=True,
    )
    assert same(weights(module), weights(expected))
    # and the next resumed run knows of them, too
    assert {r["batch_idx"] for r in records(tmp_path / "again")} == later


def test_other_data_under_the_same_index_are_trained_on(tmp_path: Path) -> None:
    first_run(tmp_path, poisoned(batches(40), nan=[30]))
    listener = Listener()
    _, rollback = resume(tmp_path, batches(40, seed=8), [listener])
    assert rollback.skips == 0
    assert not listener.found


def test_a_lost_batch_in_another_epoch_is_trained_on(tmp_path: Path) -> None:
    """What is lost is one serving of it, not the samples."""
    data = batches(12)
    log = LostBatches(tmp_path, rank=0)
    log.record(3, 0, 3, data[3])
    log.mark_skipped(1)
    again = LostBatches(None, rank=0, earlier=[str(tmp_path)])
    again.record(15, 1, 3, data[3])
    assert not again.repeats_lost_batch()
    again.record(3, 0, 3, data[3])
    assert again.repeats_lost_batch()
    again.record(3, 0, 4, data[3])
    assert not again.repeats_lost_batch()


@pytest.mark.parametrize(
    "torn",
    [
        '{"epoch": 0, "batch_idx": 31, "reas',
        "\x00\x00",
        "[]",
        "3",
        "null",
        "{}",
        '{"epoch": 0, "batch_idx": 31, "reason": "skipped", "step": 31, "colour": "blue"}',
        '{"epoch": [0], "batch_idx": 31, "reason": "skipped", "step": 31}',
        '{"epoch": 0, "batch_idx": 31, "reason": "skipped", "step": 31, "fingerprint": "blue"}',
    ],
)
def test_invalid_line_is_ignored(tmp_path: Path, torn: str) -> None:
    log = LostBatches(tmp_path, rank=0)
    data = batches(40)
    log.record(30, 0, 30, data[30])
    log.mark_skipped(1)
    with (tmp_path / LOG).open("a") as file:
        file.write(torn)
    again = LostBatches(None, rank=0, earlier=[str(tmp_path)])
    again.record(30, 0, 30, data[30])
    assert again.repeats_lost_batch()
    again.record(31, 0, 31, data[31])
    assert not again.repeats_lost_batch()


def test_what_follows_a_torn_line_is_not_lost(tmp_path: Path) -> None:
    """A killed process leaves half a line; the resumed one writes on in the same file."""
    (tmp_path / LOG).write_text('{"epoch": 0, "batch_idx": 1, "rea')
    log, data = LostBatches(tmp_path, rank=0), batches(1)
    log.record(5, 0, 5, data[0])
    log.mark_skipped(1)
    assert LostBatches(None, rank=0, earlier=[str(tmp_path)]).earlier() == {(0, 5): "skipped"}


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00rubbish\xff\n", "a folder"])
def test_unreadable_log_is_no_error(tmp_path: Path, content: Any) -> None:
    first_run(tmp_path, poisoned(batches(25), nan=[22]))
    (tmp_path / LOG).unlink()
    if content == "a folder":
        (tmp_path / LOG).mkdir()
    elif content is not None:
        (tmp_path / LOG).write_bytes(content)
    _, rollback = resume(tmp_path, batches(25))
    assert rollback.skips == 0


def test_log_of_a_reused_folder_is_continued(tmp_path: Path) -> None:
    for n_runs in (1, 2):
        rollback = NaNRollback(**FAST, incident_dir=str(tmp_path))
        fit(Classifier(), poisoned(batches(5), nan=[2]), [rollback], tmp_path)
        assert len(records(tmp_path)) == n_runs


def test_healthy_run_writes_no_log(tmp_path: Path) -> None:
    fit(Classifier(), batches(5), [NaNRollback()], tmp_path)
    assert not (tmp_path / LOG).exists()


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_memory_stays_bounded_in_a_long_run(check: Any) -> None:
    class Look(pl.Callback):
        most = 0

        def on_train_batch_end(self, *_: Any) -> None:
            self.most = max(self.most, len(rollback._session.lost_batches._seen))

    rollback = NaNRollback(check=check, snapshot_every_n_steps=10, keep_snapshots=2, max_dossiers=0)
    look = Look()
    fit(Classifier(), poisoned(batches(200, size=4), nan=[77, 130]), [rollback, look], max_epochs=2)
    # the oldest snapshot may have four after it that are not trusted, a fifth that is, and a pending one
    assert look.most < (1 + PATIENCE + 1) * 11


def test_no_references_to_batches_are_kept() -> None:
    data = batches(5)
    log = LostBatches(None, rank=0)
    for i, batch in enumerate(data):
        log.record(i, 0, i, batch)
    for served in log._seen:
        values = (getattr(served, field.name) for field in fields(served))
        tensors = [value for value in values if isinstance(value, Tensor)]
        assert sum(t.untyped_storage().nbytes() for t in tensors) <= 16


def is_recognized(lost: Any, served: Any, folder: Path) -> bool:
    log = LostBatches(folder, rank=0)
    log.record(0, 0, 0, lost)
    log.mark_skipped(1)
    again = LostBatches(None, rank=0, earlier=[str(folder)])
    again.record(0, 0, 0, served)
    return again.repeats_lost_batch()


@pytest.mark.parametrize(
    "batch",
    [
        torch.arange(12).view(3, 4),
        (torch.tensor([1.0, math.nan, math.inf, -math.inf]), torch.tensor([1])),
        {"text": ["a", "b"], "tokens": [torch.arange(5), torch.arange(3)]},
        torch.rand(3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        torch.tensor([True, False]),
        torch.rand(300, 300, generator=torch.Generator().manual_seed(0)).t(),
        torch.tensor(3.5),
        [torch.empty(0), torch.ones(2)],
    ],
)
def test_a_batch_is_recognized(tmp_path: Path, batch: Any) -> None:
    assert is_recognized(batch, batch, tmp_path)


def test_other_batches_are_not(tmp_path: Path) -> None:
    x = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    others: list[Any] = [x + 1e-3, x * math.nan, x[:3], torch.zeros(4, 10), [], "text", None]
    for i, other in enumerate(others):
        assert not is_recognized(x, other, tmp_path / str(i)), i
    big = torch.zeros(2 * RECOGNIZED_BY)
    big[0] = 1
    assert not is_recognized(torch.zeros(2 * RECOGNIZED_BY), big, tmp_path / "big")


@pytest.mark.parametrize("batch", ["text", None, [], {"label": "cat"}, torch.empty(0), torch.tensor([1j])])
def test_batch_without_a_fingerprint_is_never_omitted(tmp_path: Path, batch: Any) -> None:
    assert not is_recognized(batch, batch, tmp_path)


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        ({"x": torch.ones(2), "id": torch.tensor([5, 7])}, [5, 7]),
        ({"x": torch.ones(2), "sample_ids": ["a", "b"]}, ["a", "b"]),
        ({"x": torch.ones(2), "__key__": ("a", "b")}, ["a", "b"]),
        ({"x": torch.ones(2), "idx": torch.tensor([[1], [2]])}, []),
        ({"x": torch.ones(2), "key": torch.tensor([0.5])}, []),
        ({"x": torch.ones(2), "id": [object(), object()]}, []),
        ({"x": torch.ones(2), "id": 3}, []),
        ((torch.ones(2), torch.tensor([1, 2])), []),
    ],
)
def test_samples_are_logged_where_the_batch_has_them(tmp_path: Path, batch: Any, samples: list[Any]) -> None:
    log = LostBatches(tmp_path, rank=0)
    log.record(0, 0, 0, batch)
    log.mark_skipped(1)
    assert records(tmp_path)[0]["samples"] == samples


def test_each_rank_has_its_own_log(tmp_path: Path) -> None:
    for rank in (0, 3):
        log = LostBatches(tmp_path, rank=rank)
        log.record(0, 0, rank, torch.ones(2))
        log.mark_skipped(1)
    assert {f.name for f in tmp_path.iterdir()} == {LOG, "lost_batches.rank3.jsonl"}
    assert LostBatches(None, rank=3, earlier=[str(tmp_path)]).earlier().keys() == {(0, 3)}
    assert LostBatches(None, rank=1, earlier=[str(tmp_path)]).earlier() == {}


def test_no_batch_is_logged_twice(tmp_path: Path) -> None:
    log = LostBatches(tmp_path, rank=0)
    for i in range(4):
        log.record(i, 0, i, torch.ones(2))
    log.mark_skipped(1)
    log.mark_skipped(2)
    log.mark_undone(1)
    log.mark_undone(0)
    logged = [(r["batch_idx"], r["reason"]) for r in records(tmp_path)]
    assert logged == [(3, "skipped"), (2, "skipped"), (1, "undone"), (0, "undone")]


def test_losing_none_is_not_losing_all(tmp_path: Path) -> None:
    log = LostBatches(tmp_path, rank=0)
    log.record(0, 0, 0, torch.ones(2))
    log.mark_skipped(0)
    assert not (tmp_path / LOG).exists()


def test_training_continues_without_a_folder_for_the_log(tmp_path: Path) -> None:
    module = Classifier()
    trainer = pl.Trainer(
        accelerator="cpu", fast_dev_run=5, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.callbacks.append(NaNRollback())  # type: ignore[attr-defined]
    trainer.fit(module, plain_loader(poisoned(batches(5), nan=[2])))
    assert not list(tmp_path.rglob("*.jsonl"))
    assert all(bool(torch.isfinite(p).all()) for p in nn.Module.parameters(module))
