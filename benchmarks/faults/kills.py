"""Kills guarded runs with SIGKILL at random moments, checks their files, and resumes them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from benchmarks.faults.injection import corrupted
from benchmarks.faults.runs import quietly
from benchmarks.faults.tasks import MLP, batches
from lightning_gradguard import default_callbacks
from lightning_gradguard.runtime.incidents.dossier import read_dossier

BATCHES = 400


@dataclass(frozen=True)
class Kill:
    """The files that one kill leaves, and the resumed run.

    Args:
        after: Seconds from the start of training to the kill.
        step: Steps in the newest checkpoint.
        torn: Files that could not be read.
        resumed: True if training resumed from the checkpoint, to the end, with finite weights.
    """

    after: float
    step: int
    torn: list[str]
    resumed: bool


def train(folder: Path, checkpoint: str | None = None, max_steps: int = -1) -> None:
    """A guarded run with a checkpoint every five steps, and a NaN batch every thirty."""
    data = [corrupted(b, "NaN input") if i % 30 == 7 else b for i, b in enumerate(batches(BATCHES))]
    module = MLP("Adam")
    keep = ModelCheckpoint(folder / "checkpoints", every_n_train_steps=5, save_top_k=-1, save_last=True)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1 if max_steps < 0 else -1,
        max_steps=max_steps,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*default_callbacks(), keep],
    )
    (folder / "started").touch()
    trainer.fit(module, DataLoader(data, batch_size=None), ckpt_path=checkpoint)  # type: ignore[arg-type]
    if not all(bool(torch.isfinite(p).all()) for p in module.parameters()):
        raise SystemExit(1)


def torn(folder: Path) -> list[str]:
    """Files of a run that cannot be read back."""
    bad = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            if path.suffix == ".ckpt":
                torch.load(path, weights_only=False)
            elif path.suffix == ".jsonl":
                for line in path.read_text().splitlines():
                    json.loads(line)
            elif path.name == "dossier.pt" and not path.parent.name.startswith("."):
                read_dossier(path)
        except Exception as error:
            bad.append(f"{path.name}: {error!r}"[:200])
    return bad


def kill(seed: int) -> Kill:
    """Trains in a process of its own, kills it, checks its files, and resumes."""
    after = random.Random(seed).uniform(0.0, 1.5)
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        process = context.Process(target=quietly, args=(train, folder))
        process.start()
        while not (folder / "started").exists():
            time.sleep(0.01)
        time.sleep(after)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        bad = torn(folder)
        checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime_ns)
        newest = str(checkpoints[-1]) if checkpoints else None
        step = int(torch.load(newest, weights_only=False)["global_step"]) if newest else 0
        again = context.Process(target=quietly, args=(train, folder, newest, step + 50))
        again.start()
        again.join()
        return Kill(after, step, bad + torn(folder), again.exitcode == 0)


def main(kills: int = 50) -> list[Kill]:
    """Kills that many runs, one after the other."""
    return [kill(seed) for seed in range(kills)]


def summary(found: list[Kill]) -> str:
    """The kills in one sentence."""
    steps = sorted(k.step for k in found)
    resumed, broken = sum(k.resumed for k in found), sum(bool(k.torn) for k in found)
    return (
        f"{len(found)} kills at steps {steps[0]} to {steps[-1]} of a run that writes a checkpoint every five "
        f"steps: {resumed} resumed and continued, {broken} left a torn file."
    )
