"""A training loop of your own, without Lightning: clip, leave a sick step out, go back, back off, resume.

Batches are NaN now and then or a thousand times too large, and in mid-run a bit of a weight flips. Run it as
`python examples/own_loop.py`. All that is used is in `lightning_gradguard.core`, which needs torch alone.
"""

import copy
import io
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.core.backoff import Backoff
from lightning_gradguard.core.clipping import ZScoreClipping
from lightning_gradguard.core.detectors import SpikeDetector
from lightning_gradguard.core.norms import measure_gradients, scale_gradients_
from lightning_gradguard.core.recovery import RecoveryPolicy
from lightning_gradguard.core.snapshots import BufferCopies, Snapshot, SnapshotRing

#: The parts of a `Guard` whose memory goes into a checkpoint.
REMEMBERING = ("policy", "spikes", "recovery", "backoff")


class Guard:
    """What stands between `loss.backward()` and `optimizer.step()`.

    Args:
        network: The network in training.
        optimizer: Of its weights.
        snapshot_every_n_steps: Good steps between copies of the training state.
    """

    def __init__(self, network: nn.Module, optimizer: Optimizer, snapshot_every_n_steps: int = 20) -> None:
        self.network = network
        self.optimizer = optimizer
        self.snapshot_every_n_steps = snapshot_every_n_steps
        self.policy = ZScoreClipping()
        self.spikes = SpikeDetector()
        self.recovery = RecoveryPolicy(patience=3, max_rollbacks=5, max_skip_fraction=0.5)
        self.backoff = Backoff(factor=0.5, rewarm_steps=20, recover_after_steps=100)
        self.buffers = BufferCopies(network)
        self.snapshots = SnapshotRing(keep=2)
        self.snapshots.capture(self._copy_state, qualified=True)
        self.good_steps = 0
        self.skips = 0

    def step(self, loss: Tensor) -> None:
        """Take the step that `loss.backward()` has prepared, or leave it out; go back if need be.

        Raises:
            RuntimeError: If that has been necessary too often.
        """
        gradients = measure_gradients(self.network.named_parameters())
        value, total_norm = loss.item(), gradients.total_norm.item()
        if not math.isfinite(value + total_norm) or self.spikes.update(total_norm):
            self.skips += 1
            self.buffers.restore()  # the forward pass of a bad batch has moved statistics
            decision = self.recovery.on_skip(0)
        else:
            decision, _ = self.recovery.on_good_step(0, value, total_norm)
            scale_gradients_(gradients, self.policy.coefficients(gradients))
            self.policy.commit()
            with scaled_rates(self.optimizer, self.backoff.scale):
                self.optimizer.step()
            self.buffers.refresh()
            self.backoff.step()
            self.snapshots.good_step()
            self.good_steps += 1
            if self.good_steps % self.snapshot_every_n_steps == 0:
                self.snapshots.capture(self._copy_state)
        if decision == "roll_back":
            snapshot = self.snapshots.roll_back()
            snapshot.restore([self.network], [self.optimizer])
            self.buffers.refresh()
            self.policy.load_state_dict(copy.deepcopy(snapshot.extra_state))
            self.recovery.on_rollback()
            self.backoff.reduce()
        elif decision == "stop":
            raise RuntimeError(f"training cannot be kept alive: gone back {self.recovery.rollbacks} times")

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to decide as this one would; snapshots begin anew."""
        remembering = {name: getattr(self, name).state_dict() for name in REMEMBERING}
        return copy.deepcopy({**remembering, "good_steps": self.good_steps, "skips": self.skips})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue, after the network and the optimizer have been loaded."""
        for name in REMEMBERING:
            getattr(self, name).load_state_dict(state_dict[name])
        self.good_steps, self.skips = state_dict["good_steps"], state_dict["skips"]
        self.buffers.refresh()
        self.snapshots.clear()
        self.snapshots.capture(self._copy_state, qualified=True)

    def _copy_state(self, snapshot: Snapshot) -> None:
        snapshot.capture([self.network], [self.optimizer])
        snapshot.extra_state = copy.deepcopy(self.policy.state_dict())


@contextmanager
def scaled_rates(optimizer: Optimizer, scale: float) -> Iterator[None]:
    """Scale learning rates while the optimizer steps: a schedule never sees it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= scale
    try:
        yield
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def batches(n: int) -> list[Tensor]:
    """One in thirty is NaN, one in thirty holds readings that are a thousand times too large."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(64, 8, generator=generator) for _ in range(n)]
    for broken in data[29::30]:
        broken.fill_(torch.nan)
    for broken in data[14::30]:
        broken[:4] *= 1000
    return data


def start() -> Guard:
    """A fresh network, its optimizer, and their guard."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 1))
    return Guard(network, torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9))


def restart(guard: Guard) -> Guard:
    """End here, and go on from a checkpoint."""
    file = io.BytesIO()
    parts = ("network", "optimizer")
    torch.save(
        {"guard": guard.state_dict(), **{name: getattr(guard, name).state_dict() for name in parts}}, file
    )
    file.seek(0)
    checkpoint, fresh = torch.load(file), start()
    for name in parts:
        getattr(fresh, name).load_state_dict(checkpoint[name])
    fresh.load_state_dict(checkpoint["guard"])
    return fresh


def loss_of(network: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.mse_loss(network(batch), batch.sum(1, keepdim=True))


def train(max_steps: int, *, guarded: bool = True, restart_at: int = 0) -> tuple[Guard, float]:
    """Train, and measure the error on new data."""
    guard = start()
    for i, batch in enumerate(batches(max_steps), start=1):
        guard.optimizer.zero_grad()
        loss = loss_of(guard.network, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if guarded:
            guard.step(loss)
        else:
            guard.optimizer.step()
        if i == max_steps // 2:
            weight = guard.network.get_parameter("3.weight")
            weight.data.view(torch.int32)[0, 0] ^= 1 << 30  # the highest bit of the exponent
        if i == restart_at:
            guard = restart(guard)
    with torch.no_grad():
        error = loss_of(
            guard.network.eval(), torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
        )
    return guard, float(error)


def main(max_steps: int = 600) -> dict[str, float]:
    _, bare = train(max_steps, guarded=False)
    guard, guarded = train(max_steps)
    _, resumed = train(max_steps, restart_at=max_steps * 3 // 4)
    print(f"{guard.skips} of {max_steps} steps left out, rolled back: {guard.recovery.rollbacks}")
    print(f"error on new data: {bare:.3f} bare, {guarded:.3f} guarded, {resumed:.3f} stopped and resumed")
    return {"bare": bare, "guarded": guarded, "resumed": resumed}


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
