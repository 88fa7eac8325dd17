"""A run is read by the meaning of its tags."""

from __future__ import annotations

import math
from pathlib import Path

from lightning_gradguard.report.readers.runs import read_run
from lightning_gradguard.report.render.html import to_html
from tests.report.runs import report_of, write_events

NAN = math.nan


def test_loss_tag_of_lowest_rank_is_used() -> None:
    falling = [2.0 * 0.9**i for i in range(30)]
    path = write_events(
        "run", {"g_loss": [9.0] * 40, "train/loss": falling, "train_loss_epoch": [1.0], "val_loss": [5.0]}
    )
    assert read_run("run", path).loss_tag == "train/loss"


def test_longer_of_two_loss_series_is_used() -> None:
    path = write_events("run", {"training/loss": [9.0], "train/loss": [2.0] * 30, "train_loss": [9.0] * 2})
    assert read_run("run", path).loss_tag == "train/loss"


def test_layers_come_from_one_tag_family() -> None:
    tags = {"grad_norm/a.weight": [1.0], "grad_norm/b.weight": [1.0], "grad_2.0_norm/body": [1.0]}
    (gradients,) = read_run("run", write_events("run", tags)).log.gradients
    assert list(gradients.layers) == ["a.weight", "b.weight"]


def test_total_norm_is_computed_from_layers_if_it_was_not_logged() -> None:
    run = read_run("run", write_events("run", {"grad_norm/a.weight": [3.0], "grad_norm/b.weight": [4.0]}))
    assert run.log.gradients[0].total.values == [5.0]


def test_several_optimizers() -> None:
    tags = {f"grad_norm.{i}/{name}": [1.0] * 20 for i in range(2) for name in ("total", "body.weight")}
    found = report_of(write_events("run", {**tags, "d_loss": [1.0] * 20}))
    assert len(found.run.log.gradients) == 2
    assert [layer.optimizer for layer in found.layers] == [0, 1]
    assert "body.weight (optimizer 1)" in to_html([found])


def test_optimizers_keep_their_index() -> None:
    tags = {f"grad_norm.{i}/{name}": [1.0] * 20 for i in (1, 3) for name in ("total", "body.weight")}
    found = report_of(write_events("run", tags))
    assert [layer.optimizer for layer in found.layers] == [1, 3]
    page = to_html([found])
    assert "Total gradient norm of optimizer 3" in page
    assert "optimizer 0" not in page


def test_resumed_run_replaces_repeated_steps() -> None:
    losses = [2.0 * 0.95**i for i in range(60)]
    write_events("run", {"train_loss": [*losses[:40], *[NAN] * 20]})
    write_events("run", {"train_loss": losses[30:45]}, first_step=30)
    found = report_of("run")
    assert list(found.run.log.loss.steps) == list(range(45))
    assert found.verdict.status == "healthy"
    assert any("steps from 30 on were logged again" in note for note in found.notes)


def test_several_files_are_one_run() -> None:
    write_events("run", {"train_loss": [1.0] * 20})
    write_events("run", {"train_loss": [0.5] * 20}, first_step=20)
    assert len(read_run("run", Path("run")).log.loss) == 40


def test_invalid_numbers_are_omitted() -> None:
    tags = {"train_loss": [1.0] * 20, "rollback/skips": [1.0, NAN], "rollback/rollbacks": [NAN, NAN]}
    path = write_events("run", tags)
    lines = ['{"kind": "rollback", "step": Infinity}', '{"kind": "rollback", "step": NaN}']
    (path / "incidents.jsonl").write_text("\n".join(lines))
    (path / "hparams.yaml").write_text("d: 2024-02-30\n")
    found = report_of(path)
    assert (found.interventions.skips, found.interventions.rollbacks) == (1, None)
    assert "2 records of incidents.jsonl are not incidents" in found.notes
    assert any("hparams.yaml" in note for note in found.notes)


def test_hparams_with_python_objects_are_omitted() -> None:
    path = write_events("run", {"train_loss": [1.0] * 20})
    (path / "hparams.yaml").write_text("a: !!python/object/apply:os.system ['echo']\n")
    found = report_of(path)
    assert found.run.hparams == {}
    assert any("hparams.yaml" in note for note in found.notes)
