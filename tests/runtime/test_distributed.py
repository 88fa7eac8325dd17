"""Two processes: what one rank alone sees gives the same skips, rollbacks, scales and weights on both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import launch

SCRIPT = '''
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from lightning_gradguard import (
    AdaptiveGradientClipping, InitializationCheck, LearningRateBackoff, NaNRollback, default_callbacks
)
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


def main(folder, optimizer, on_failure, max_dossiers):
    torch.set_num_threads(1)
    module = Sharded(optimizer, norm=True)
    count = Count()
    rollback = NaNRollback(
        snapshot_every_n_steps=5, incident_dir=str(folder), max_dossiers=max_dossiers
    )
    clipping, backoff = AdaptiveGradientClipping(), LearningRateBackoff()
    suite = default_callbacks(
        nan_rollback=rollback,
        adaptive_gradient_clipping=clipping,
        learning_rate_backoff=backoff,
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
            "counts": [rollback.skips, rollback.rollbacks, backoff.scale],
            "collectives": count.counts,
            "policy": str(clipping.state_dict()),
        },
        Path(folder) / f"rank{rank}.pt",
    )
    dist.barrier()  # who leaves early takes the connection away from the other
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
'''


def run(tmp_path: Path, *arguments: str, source: str = SCRIPT) -> list[dict[str, Any]]:
    script = tmp_path / "train.py"
    script.write_text(source)
    launch([str(script), str(tmp_path), *arguments])
    return [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "on_failure", "max_dossiers"), [("sgd", "warn", 0), ("adam", "repair", 5)]
)
def test_one_decision_on_every_rank(
    tmp_path: Path, optimizer: str, on_failure: str, max_dossiers: int
) -> None:
    first, second = run(tmp_path, optimizer, on_failure, str(max_dossiers))
    assert first["counts"] == second["counts"]
    skips, rollbacks, scale = first["counts"]
    assert skips == 8
    assert rollbacks == 2
    assert (scale < 1) is (max_dossiers == 0), "bad data that were examined cut no rate"
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


CORRUPTED = """
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch

from lightning_gradguard import NaNRollback, default_callbacks
from tests.tasks import Classifier, batches, plain_loader


class Corrupts(pl.Callback):
    \"\"\"Writes to the gradient of one rank after the ranks have averaged it, and to its learning rate.\"\"\"

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 1e-3 * (1e4 if trainer.global_rank == 1 and batch_idx in (0, 17) else 1)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if trainer.global_rank == 1 and trainer.global_step in (5, 9, 13):
            value = {5: torch.nan, 9: 1e20, 13: torch.inf}[trainer.global_step]
            module.net[0].weight.grad[0, 0] = value


folder, check = sys.argv[1:]
torch.set_num_threads(1)
module = Classifier("adam")
rollback = NaNRollback(check=check, incident_dir=folder)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    callbacks=[Corrupts(), *default_callbacks(nan_rollback=rollback)],
)
trainer.fit(module, plain_loader(batches(30)))
torch.save(
    {"weights": [p.detach() for p in module.parameters()], "counts": [rollback.skips, rollback.rollbacks]},
    Path(folder) / f"rank{trainer.global_rank}.pt",
)
torch.distributed.barrier()  # who leaves early takes the connection away from the other
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_a_gradient_or_a_rate_corrupted_on_one_rank_is_dropped_on_all(tmp_path: Path, check: str) -> None:
    first, second = run(tmp_path, check, source=CORRUPTED)
    assert first["counts"] == second["counts"] == [5, 0]
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(one, other)
        assert bool(torch.isfinite(one).all())
    incidents = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    told = [i for i in incidents if i["action"] == "skipped"]
    rate, gradient = "unequal_learning_rates", "corrupted_gradient"
    assert [i["kind"] for i in told] == [rate, *[gradient] * 3, rate]
    assert [i["cause"] for i in told] == ["update_too_large", *["transient"] * 3, "update_too_large"]


GATHERS = """
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

from lightning_gradguard import NaNRollback, default_callbacks
from tests.tasks import Classifier, batches, plain_loader, poisoned


class Gathers(Classifier):
    \"\"\"Talks to other ranks within its step, and has layers that one rank alone stops to train.\"\"\"

    def __init__(self):
        super().__init__("adam")
        self.local = nn.Sequential(*(nn.Linear(20, 20) for _ in range(6)))
        self._ddp_params_and_buffers_to_ignore = {f"local.{n}" for n, _ in self.local.named_parameters()}

    def training_step(self, batch, batch_idx):
        self.all_gather(torch.tensor([float(len(batch[0]))]))
        share = 0.0 if dist.get_rank() == 1 and batch_idx >= 8 else 1e-3
        return super().training_step(batch, batch_idx) + share * self.local(batch[0]).square().mean()

    def train_dataloader(self):
        data = batches(60, seed=dist.get_rank())
        return plain_loader(poisoned(data, nan=[10]) if dist.get_rank() == 1 else data)


folder = sys.argv[1]
torch.set_num_threads(1)
module = Gathers()
rollback = NaNRollback(incident_dir=folder)
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=2,
    callbacks=default_callbacks(nan_rollback=rollback),
)
trainer.fit(module)
counts = [rollback.skips, rollback.rollbacks, trainer.global_step]
torch.save({"counts": counts}, Path(folder) / f"rank{trainer.global_rank}.pt")
dist.barrier()  # who leaves early takes the connection away from the other
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_that_see_different_things_do_the_same(tmp_path: Path) -> None:
    first, second = run(tmp_path, source=GATHERS)
    assert first["counts"] == second["counts"] == [1, 0, 15]


ROUTES = """
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import nn

from lightning_gradguard import InitializationCheck
from tests.tasks import Classifier, batches, plain_loader


class Routes(Classifier):
    \"\"\"Sends the batch of one rank alone through layers in which gradients vanish.\"\"\"

    def __init__(self):
        super().__init__()
        layers = [layer for _ in range(10) for layer in (nn.Linear(20, 20), nn.Sigmoid())]
        self.net, self.head = nn.Sequential(*layers), nn.Linear(20, 4)

    def training_step(self, batch, batch_idx):
        unused = sum(0 * p.sum() for p in self.net.parameters())
        inputs = batch[0] if dist.get_rank() == 1 else self.net(batch[0])
        return nn.functional.cross_entropy(self.head(inputs), batch[1]) + unused


torch.set_num_threads(1)
check = InitializationCheck()
trainer = pl.Trainer(
    accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
    strategy="ddp", enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    callbacks=[check],
)
trainer.fit(Routes(), plain_loader(batches(3)))
found = [(finding.criterion, finding.module) for finding in check.findings]
torch.save({"found": found}, Path(sys.argv[1]) / f"rank{trainer.global_rank}.pt")
dist.barrier()  # who leaves early takes the connection away from the other
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_whose_batches_run_other_layers_try_the_same_cures(tmp_path: Path) -> None:
    first, second = run(tmp_path, source=ROUTES)
    assert first["found"] == second["found"]
    assert ("gradient_gain", "") in first["found"]


SPAWNED = """
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from lightning_gradguard import NaNRollback, default_callbacks
from tests.tasks import Classifier, batches, plain_loader, poisoned


class Sharded(Classifier):
    def train_dataloader(self):
        data = batches(30, seed=dist.get_rank())
        return plain_loader(poisoned(data, nan=[4, 11, 12, 13]) if dist.get_rank() == 1 else data)


class Save(pl.Callback):
    def on_train_end(self, trainer, module):
        (rollback,) = (c for c in trainer.callbacks if isinstance(c, NaNRollback))
        weights = [p.detach() for p in module.parameters()]
        counts = [rollback.skips, rollback.rollbacks]
        file = Path(sys.argv[1]) / f"rank{trainer.global_rank}.pt"
        torch.save({"weights": weights, "counts": counts}, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    suite = default_callbacks(nan_rollback=NaNRollback(incident_dir=sys.argv[1]))
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, callbacks=[*suite, Save()],
    )
    trainer.fit(Sharded("adam"))
"""


@pytest.mark.slow
def test_spawned_processes(tmp_path: Path) -> None:
    first, second = run(tmp_path, source=SPAWNED)
    assert first["counts"] == second["counts"] == [4, 1]
    for one, other in zip(first["weights"], second["weights"], strict=True):
        assert torch.equal(one, other)


RAISES = """
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

from lightning_gradguard import GradientNormMonitor
from tests.contracts.strategies.cells import Recorder, Seen
from tests.tasks import Classifier, batches, plain_loader


class Sharded(Classifier):
    def configure_model(self):
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, batch_idx):
        if batch_idx == 3:
            raise KeyError("a bug of the user's")
        return super().training_step(batch, batch_idx)


seen = Seen()
trainer = pl.Trainer(
    accelerator="cpu", devices=2, strategy=ModelParallelStrategy(2, 1), max_epochs=1, logger=Recorder(seen),
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1,
    callbacks=[GradientNormMonitor()], use_distributed_sampler=False,
)
try:
    trainer.fit(Sharded(), plain_loader(batches(10)))
except KeyError:
    torch.save(seen.scalars, Path(sys.argv[1]) / f"rank{trainer.global_rank}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_the_last_logged_step_is_there_after_an_exception(tmp_path: Path) -> None:
    for scalars in run(tmp_path, source=RAISES):
        assert list(scalars["grad_norm/total"]) == [0, 1, 2]
        assert list(scalars["weight_norm/net.0.weight"]) == [0, 1, 2]
        assert list(scalars["update_ratio/net.0.weight"]) == [0, 1]


def test_hanging_program_is_killed_and_its_output_shown() -> None:
    with pytest.raises(AssertionError, match=r"(?s)still running after 3 seconds.*here I am"):
        launch(["-c", "import time; print('here I am', flush=True); time.sleep(60)"], patience=3)
