"""A training loop of your own, without Lightning: clip, skip, roll back, back off, resume.

Batches are NaN now and then or a thousand times too large, and in mid-run a bit of a weight flips. Run it as
`python examples/own_loop.py`. `TrainingGuard` needs torch alone.
"""

import io

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn

from lightning_gradguard import TrainingGuard
from lightning_gradguard.core.backoff import Backoff


class Training:
    """A network, its optimizer, and their guard."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        # batch normalization would take finite outliers into its running statistics
        self.network = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 1))
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.02, momentum=0.9)
        self.guard = TrainingGuard(
            self.network,
            self.optimizer,
            snapshot_every_n_steps=20,
            backoff=Backoff(factor=0.5, rewarm_steps=20, recover_after_steps=100),
        )

    def resume(self) -> "Training":
        """Write a checkpoint, and return a fresh run that has loaded it."""
        parts = ("network", "optimizer", "guard")  # the guard last: its first snapshot is of what is loaded
        file = io.BytesIO()
        torch.save({name: getattr(self, name).state_dict() for name in parts}, file)
        file.seek(0)
        checkpoint, fresh = torch.load(file), Training()
        for name in parts:
            getattr(fresh, name).load_state_dict(checkpoint[name])
        return fresh


def batches(n: int) -> list[Tensor]:
    """One in thirty is NaN, one in thirty holds readings that are a thousand times too large."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(64, 8, generator=generator) for _ in range(n)]
    for bad in data[29::30]:
        bad.fill_(torch.nan)
    for bad in data[14::30]:
        bad[:4] *= 1000
    return data


def loss_of(network: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.mse_loss(network(batch), batch.sum(1, keepdim=True))


def train(max_steps: int, *, guarded: bool = True, restart_at: int = 0) -> tuple[TrainingGuard, float]:
    """Train, and measure the error on new data."""
    run = Training()
    for i, batch in enumerate(batches(max_steps), start=1):
        run.optimizer.zero_grad()
        loss = loss_of(run.network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if guarded:
            run.guard.step(loss)
        else:
            run.optimizer.step()
        if i == max_steps // 2:
            weight = run.network.get_parameter("3.weight")
            weight.data.view(torch.int32)[0, 0] ^= 1 << 30  # the highest bit of the exponent
        if i == restart_at:
            run = run.resume()
    with torch.no_grad():
        new = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
        error = loss_of(run.network.eval(), new)
    return run.guard, float(error)


def main(max_steps: int = 600) -> dict[str, float]:
    _, bare = train(max_steps, guarded=False)
    guard, guarded = train(max_steps)
    _, resumed = train(max_steps, restart_at=max_steps * 3 // 4)
    print(f"{guard.skips} of {max_steps} steps skipped, rolled back: {guard.rollbacks}")
    print(f"error on new data: {bare:.3f} bare, {guarded:.3f} guarded, {resumed:.3f} stopped and resumed")
    return {"bare": bare, "guarded": guarded, "resumed": resumed}


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
