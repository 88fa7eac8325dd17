"""Two processes: a NaN on one rank gives the same skips, rollbacks, scales and weights on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = '''
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from lightning_gradguard import default_callbacks, NaNRollback, InitializationCheck
from tests.tasks import Classifier, batches, poisoned, plain_loader, weights


class Sharded(Classifier):
    def train_dataloader(self):
        rank = dist.get_rank()
        data = batches(40, seed=rank)
        if rank == 1:
            data = poisoned(data, nan=[4, 11, 12, 13, 14, 15, 16, 30], spikes=[8])
        return plain_loader(data)


class Count(pl.Callback):
    """Collectives of ours in each batch."""

    def __init__(self):
        self.counts = []

    def on_train_start(self, trainer, module):
        self.reduce = dist.all_reduce

        def counted(*args, **kwargs):
            self.counts[-1] += 1
            return self.reduce(*args, **kwargs)

        dist.all_reduce = counted

    def on_train_batch_start(self, *args):
        self.counts.append(0)

    def on_train_end(self, trainer, module):
        dist.all_reduce = self.reduce


def main(folder, optimizer, on_failure):
    torch.set_num_threads(1)
    module = Sharded(optimizer, norm=True)
    count = Count()
    suite = default_callbacks(
        nan_rollback=NaNRollback(snapshot_every_n_steps=5, incident_dir=str(folder)),
        initialization_check=InitializationCheck(on_failure=on_failure),
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[count, *suite], use_distributed_sampler=False, log_every_n_steps=5,
    )
    trainer.fit(module)
    rank = trainer.global_rank
    buffers = {name for name, _ in module.named_buffers()}
    torch.save(
        {
            "weights": {n: t for n, t in module.state_dict().items() if n not in buffers},
            "buffers": [b for b in module.buffers()],
            "counts": [suite[2].skips, suite[2].rollbacks, suite[4].scale],
            "collectives": count.counts,
            "policy": str(suite[3].state_dict()),
        },
        Path(folder) / f"rank{rank}.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
'''


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run(
        [sys.executable, str(script), str(tmp_path), *arguments],
        env=environment,
        check=True,
        timeout=60,
        capture_output=True,
    )
    return [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize(("optimizer", "on_failure"), [("sgd", "warn"), ("adam", "repair")])
def test_one_decision_on_every_rank(tmp_path: Path, optimizer: str, on_failure: str) -> None:
    first, second = run(tmp_path, optimizer, on_failure)
    assert first["counts"] == second["counts"]
    skips, rollbacks, scale = first["counts"]
    assert skips == 8
    assert rollbacks == 2
    assert scale < 1
    assert first["policy"] == second["policy"]
    for name, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][name]), name
        assert bool(torch.isfinite(tensor).all())
    for buffers in (first["buffers"], second["buffers"]):
        assert all(bool(torch.isfinite(buffer).all()) for buffer in buffers)
    # the first batch has a second one: the verdict of the initialization check
    assert max(first["collectives"][1:]) == 1
    assert first["collectives"] == second["collectives"]
    assert len((tmp_path / "incidents.jsonl").read_text().splitlines()) >= 8 + 2
