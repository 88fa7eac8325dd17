"""Trains the demo over five seeds: bare, with a hand-tuned `gradient_clip_val=1.0`, and with the suite.

Takes about two minutes on two cores.
"""

from __future__ import annotations

import logging
import math
import tempfile
import warnings
from pathlib import Path

from lightning_gradguard import default_callbacks
from lightning_gradguard.cli.demo import Run, train


def main(seeds: int = 5, max_steps: int = 300) -> dict[str, list[Run]]:
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    runs: dict[str, list[Run]] = {"bare": [], "clip 1.0": [], "guarded": []}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            shared = {"seed": seed, "max_steps": max_steps, "logdir": Path(folder)}
            runs["bare"].append(train("bare", [], **shared))  # type: ignore[arg-type]
            clipped = train("clip 1.0", [], gradient_clip_val=1.0, **shared)  # type: ignore[arg-type]
            runs["clip 1.0"].append(clipped)
            runs["guarded"].append(train("guarded", default_callbacks(), **shared))  # type: ignore[arg-type]
    print("| run | " + " | ".join(f"seed {seed}" for seed in range(seeds)) + " | mean |")
    print("|---|" + "---|" * (seeds + 1))
    for name, members in runs.items():
        cells = [f"{r.final_loss:.3f} ({r.survived} steps)" for r in members]
        mean = sum(r.final_loss for r in members) / seeds
        print(f"| {name} | " + " | ".join(cells) + f" | {mean:.3f} |")
    return runs


def is_promised(runs: dict[str, list[Run]]) -> bool:
    """True if every guarded run ends at a loss of 2.0 or less, while every bare run fails."""
    return all(math.isnan(run.final_loss) and run.survived < 10 for run in runs["bare"]) and all(
        run.final_loss <= 2.0 for run in runs["guarded"]
    )
