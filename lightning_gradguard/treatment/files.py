"""Writes what a treatment leaves: configuration, report, JSON, TensorBoard runs."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_gradguard.core.remedies.changes import Change
from lightning_gradguard.core.tags import HELD_OUT_LOSS, TRAINING_LOSS
from lightning_gradguard.treatment.page import to_html
from lightning_gradguard.treatment.result import TreatmentResult
from lightning_gradguard.treatment.trials.program import TreatmentError
from lightning_gradguard.treatment.trials.trial import Trial, name_of

CONFIGURATION, REPORT, CONTENT, RUNS = "treatment.yaml", "report.html", "treatment.json", "runs"
TRIALS = "trials.jsonl"


def require_no_others(folder: Path) -> None:
    """Raises an error if a folder has files, of the names that a treatment writes, that are of no treatment.

    Raises:
        TreatmentError: With the names.
    """
    names = [name for name in (CONFIGURATION, REPORT, CONTENT, RUNS) if (folder / name).exists()]
    if names and not (folder / TRIALS).exists():
        raise TreatmentError(
            f"{folder} has {', '.join(names)} but no {TRIALS}: they may be yours, and would be replaced. "
            "Give another folder with --out (out=), or delete them."
        )


def write(result: TreatmentResult, command: str, callbacks: Sequence[Any]) -> None:
    """Writes all files of a result into its folder; the configuration only if there is a treatment."""
    folder = result.folder
    _replace(folder / CONTENT, result.as_json() + "\n")
    path = folder / CONFIGURATION
    if result.is_treated:
        head = f"# {result.headline}\n# {command}\n"
        content = yaml.safe_dump(configuration(result.changes, callbacks), sort_keys=False)
        _replace(path, head + content)
    elif path.exists():
        path.unlink()
    _replace(folder / REPORT, to_html(result, command if result.is_treated else ""))
    _write_runs(folder / RUNS, [result.probe, *result.trials])


def configuration(changes: Sequence[Change], callbacks: Sequence[Any]) -> dict[str, Any]:
    """Returns what LightningCLI needs to train with changes, beside the callbacks that `fit` adds itself."""
    of_treatment = [c.as_dict() for c in changes if c.is_of_treatment]
    # without changes of its own, it marks the bounds of others as those of a treatment
    added = [*callbacks, *([_class("Treatment", changes=of_treatment)] if changes else [])]
    trainer: dict[str, Any] = {"callbacks": added}
    for change in changes:
        if change.kind == "clipping":
            policy = _class("GlobalNormClipping", max_norm=change["max_norm"])
            added.append(_class("AdaptiveGradientClipping", policy=policy))
        elif change.kind == "weight_norm":
            added.append(_class("WeightNormConstraint", max_norm=change["max_norm"]))
        elif change.alters == "trainer":
            trainer[change.kind] = change["value"]
    return {"trainer": trainer}


def _class(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"lightning_gradguard.{name}", "init_args": arguments}


def _replace(path: Path, text: str) -> None:
    """Writes a file at once, so that a kill leaves the old one or the new one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)


def _write_runs(folder: Path, trials: Sequence[Trial]) -> None:
    # TensorBoard takes longer to import than all else that a command line does
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(folder, ignore_errors=True)
    for i, trial in enumerate(trials):
        name = re.sub(r"[^\w.=-]+", "_", name_of(trial.job.changes)).strip("_")[:60]
        with SummaryWriter(str(folder / f"{i:02d}_{name}_seed{trial.job.seed}")) as writer:
            curves = {HELD_OUT_LOSS: trial.curve, TRAINING_LOSS: trial.training}
            for tag, step, value in ((tag, *point) for tag, curve in curves.items() for point in curve):
                if math.isfinite(value):
                    writer.add_scalar(tag, value, step)
