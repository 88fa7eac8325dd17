"""Clipping by norm of sharded weights: every policy works under FSDP2, with the norms of one device.

Run it as `python examples/sharded_clipping.py`: two processes on a CPU. On GPUs, pass the Trainer
`accelerator="gpu"` and their number as `devices`.
"""

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradguard import AdaptiveGradientClipping, GradientNormMonitor, NaNRollback, UnitwiseClipping


class Sharded(pl.LightningModule):
    """A network whose layers are sharded over all processes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))

    def configure_model(self) -> None:
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(4096, 20, generator=generator)
        inputs[1000] = torch.nan  # one sample, on one of the processes
        return DataLoader(TensorDataset(inputs, inputs[:, :4].argmax(1)), batch_size=32)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(max_steps: int = 200) -> pl.Trainer:
    pl.seed_everything(0, verbose=False)  # every process initializes the same weights, then shards them
    # norms of units and total norms are those of the whole tensors, not of the shards
    clipping = AdaptiveGradientClipping(UnitwiseClipping(clipping=0.05), exclude=["net.4"])
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        callbacks=[GradientNormMonitor(), clipping, NaNRollback()],
        max_steps=max_steps,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Sharded())
    if trainer.is_global_zero:
        metrics = trainer.callback_metrics
        print(
            f"batches skipped: {int(metrics['rollback/skips'])}, total norm {metrics['grad_norm/total']:.3f}"
        )
    torch.distributed.barrier()  # a process that exits early closes the connections of the others
    torch.distributed.destroy_process_group()
    return trainer


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
