"""AUTOTRAINER's rules on the generated programs, within the optimizer steps that a treatment has taken.

`python -m benchmarks.treatment.autotrainer` reads the outcomes of `python -m benchmarks.treatment`.
Thresholds, repairs and their order are those that Zhang et al. (ICSE 2021) publish, with the defaults of
their release: an issue is found by accuracies and gradients of each epoch, its repairs are tried in a fixed
order, each in a whole run, until a run has no issue; a new issue has its repairs tried after those before it.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from benchmarks.records import add_record, read_records
from benchmarks.treatment.__main__ import SEED, TRAINS
from benchmarks.treatment.programs import ACTIVATIONS, STEPS, Data, Network, Spec, specs
from lightning_gradguard.core.remedies.changes import Change, apply

#: Ratio of the first gradient to the last below which gradients vanish, if the first is below the second
#: number, and above which they explode; share of gradients that are zero; fluctuation and its share of the
#: epochs; gain of accuracy; accuracy of a network that trains; share of the run after which it is judged.
VANISHES, SMALL, EXPLODES, DEAD, FLUCTUATES, OFTEN, GAIN, ACCURATE, JUDGED = (
    *(1e-3, 1e-4, 70.0),
    *(0.7, 0.03, 0.2, 0.01, 0.7, 0.3),
)
#: Repairs of each issue in their order, with the number of times that each is tried.
REPAIRS = {
    "vanish": ("selu", "relu", "norm"),
    "explode": ("selu", "relu", "clip", "clip", "tanh", "norm"),
    "dead": ("selu", "norm", *["initialize"] * 3, "leaky", "elu", "thresholded"),
    "unstable": ("adam", "lr 0.1", "lr 0.01", "lr 0.001", "plateau", "batch 2", "batch 4", "batch 8")
    + ("momentum",) * 3
    + ("noise",),
    "slow": (*["optimizer"] * 3, "lr 10", "lr 100", "lr 1000"),
}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    **{"selu": nn.SELU, "relu": nn.ReLU, "tanh": nn.Tanh, "leaky": lambda: nn.LeakyReLU(0.3), "elu": nn.ELU},
    "thresholded": lambda: nn.Threshold(1.0, 0.0),
}
#: Variance of a weight times its inputs, by repair.
_VARIANCES = {"selu": 1.0, "relu": 2.0, "tanh": 2.0}
_OPTIMIZERS: Sequence[type[torch.optim.Optimizer]] = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
)


@dataclass(frozen=True)
class Setting:
    """Repairs that a run is made with, the seed of what they draw, and the issue that the last is for."""

    repairs: tuple[str, ...] = ()
    seed: int = 0
    issue: str = ""


@dataclass
class History:
    """What is recorded of each epoch: accuracies, and norms of the gradients of its first batch."""

    training: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    gradients: list[tuple[float, float, float]] = field(default_factory=list)
    is_finite: bool = True

    def issue(self, n_epochs: int) -> str:
        """Returns the issue of a run so far; empty if it has none."""
        if not self.is_finite:
            return "explode"
        if len(self.training) < JUDGED * n_epochs:
            return ""
        is_slow = max(_gain(self.training), _gain(self.validation)) < GAIN
        if min(max(self.training), max(self.validation)) < ACCURATE or is_slow:
            if any(zero >= DEAD for _, _, zero in self.gradients):
                return "dead"
            if any(first > EXPLODES * last for first, last, _ in self.gradients):
                return "explode"
            if any(first < min(VANISHES * last, SMALL) for first, last, _ in self.gradients):
                return "vanish"
            return "slow" if is_slow else ""
        return "unstable" if self._n_fluctuations() >= OFTEN * len(self.training) else ""

    def _n_fluctuations(self) -> int:
        inner = list(zip(self.training, self.training[1:], self.training[2:], strict=False))
        highest = [b for a, b, c in inner if b >= max(a, c)]
        lowest = [b for a, b, c in inner if b <= min(a, c)]
        return sum(high - low >= FLUCTUATES for high, low in zip(highest, lowest, strict=False))


def _gain(accuracies: Sequence[float]) -> float:
    return max(
        (after - before for before, after in zip(accuracies, accuracies[1:], strict=False)), default=0.0
    )


def run(spec: Spec, setting: Setting, seed: int) -> tuple[float, str]:
    """Trains a program with repairs; returns its accuracy on held-out data, and the issue of the run."""
    torch.manual_seed(seed)
    data, draw, module = Data(spec.data), random.Random(setting.seed), Network(spec)
    kinds = [repair.split()[0] for repair in setting.repairs]
    factors = {r.split()[0]: float(r.split()[1]) for r in setting.repairs if " " in r}
    for kind in kinds:
        _change(module, kind, draw, data)
    optimizer = _optimizer(module, kinds, draw)
    for group in optimizer.param_groups:
        group["lr"] *= factors.get("lr", 1.0)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.2, patience=5, min_lr=1e-3)
    loader = DataLoader(data.training, int(64 * factors.get("batch", 1)), shuffle=True, drop_last=True)
    weights = [weight for weight in module.parameters() if weight.ndim > 1]
    history, n_epochs, step = History(), STEPS // len(loader), 0
    while step < STEPS:
        rights = []
        for i, (x, y) in enumerate(loader):
            x = x + 0.1 * torch.randn_like(x) if "noise" in kinds else x
            optimizer.zero_grad()
            answers = module(x)
            nn.functional.cross_entropy(answers, y).backward()
            gradients = [w.grad for w in weights if w.grad is not None]
            norms = [float(g.norm()) for g in gradients]
            history.is_finite = history.is_finite and all(map(math.isfinite, norms))
            if i == 0:
                zeros = sum(int((g == 0).sum()) for g in gradients) / sum(g.numel() for g in gradients)
                history.gradients.append((norms[0], norms[-1], zeros))
            if "clip" in kinds:
                nn.utils.clip_grad_value_(module.parameters(), 10.0)
            optimizer.step()
            rights.append(float((answers.argmax(1) == y).float().mean()))
            step += 1
            if step == STEPS or not history.is_finite:
                break
        accuracy, loss = _evaluated(module, data)
        history.training.append(sum(rights) / len(rights))
        history.validation.append(accuracy)
        if not history.is_finite:
            break
        if "plateau" in kinds:
            plateau.step(loss)
    return history.validation[-1], history.issue(n_epochs)


def _evaluated(module: Network, data: Data) -> tuple[float, float]:
    x, y = data.validation.tensors
    module.eval()
    with torch.no_grad():
        answers = module(x)
    module.train()
    loss = float(nn.functional.cross_entropy(answers, y))
    return float((answers.argmax(1) == y).float().mean()), loss


def _change(module: Network, kind: str, draw: random.Random, data: Data) -> None:
    """Makes the change of the network that a repair has; recurrent layers keep, or get, tanh."""
    if kind in _ACTIVATIONS:
        if isinstance(module.body, nn.RNN):
            module.body.nonlinearity, module.body.mode = "tanh", "RNN_TANH"
            return
        assert isinstance(module.body, nn.Sequential)
        for name, child in module.body.named_children():
            if isinstance(child, (*ACTIVATIONS.values(), nn.SELU)):
                setattr(module.body, name, _ACTIVATIONS[kind]())
    if kind in _VARIANCES or kind == "initialize":
        _initialize(module, _VARIANCES.get(kind) or draw.choice((1.0, 2.0)))
    if kind == "norm":
        x, y = (tensor[:64] for tensor in data.validation.tensors)
        apply(module, Change("add_normalization", {"norm": "batch"}), lambda: module.training_step((x, y), 0))


def _initialize(module: Network, variance: float) -> None:
    for name, weight in module.body.named_parameters():
        if weight.ndim > 1:
            bound = math.sqrt(3 * variance / (weight.numel() / len(weight)))
            nn.init.uniform_(weight, -bound, bound)
        elif "bias" in name:
            nn.init.zeros_(weight)


def _optimizer(module: Network, kinds: Sequence[str], draw: random.Random) -> torch.optim.Optimizer:
    """Returns the program's optimizer, or that of the last repair that replaces it, with its defaults."""
    own: torch.optim.Optimizer = module.configure_optimizers()
    for kind in kinds:
        if kind == "adam":
            own = torch.optim.Adam(module.parameters())
        elif kind == "momentum":
            own = torch.optim.SGD(module.parameters(), 0.01, momentum=draw.uniform(0.01, 0.9))
        elif kind == "optimizer":
            made: Any = draw.choice([one for one in _OPTIMIZERS if not isinstance(own, one)])
            own = made(module.parameters(), 0.01 if made is torch.optim.SGD else 1e-3)
    return own


def repaired(spec: Spec, n_runs: int) -> tuple[Setting, int]:
    """Returns the first setting whose run has no issue, or the most accurate, and the runs it took."""
    best, waiting, taken = (-1.0, Setting()), [Setting()], 0
    while waiting and taken < n_runs:
        setting = waiting.pop(0)
        accuracy, issue = run(spec, setting, 0)
        taken += 1
        if not issue:
            return setting, taken
        best = max(best, (accuracy, setting), key=lambda one: one[0])
        if issue != setting.issue:
            waiting += [
                Setting((*setting.repairs, repair), i, issue) for i, repair in enumerate(REPAIRS[issue])
            ]
    return best[1], taken


def main() -> None:
    """Runs the rules on the failing programs that were treated, and prints what they reach."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.treatment.autotrainer", description=__doc__)
    parser.add_argument("--treated", type=Path, default=Path("runs/treatment.jsonl"))
    parser.add_argument("--kept", type=Path, default=Path("runs/autotrainer.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    known = {record["name"]: record for record in read_records(options.kept)}
    by_name = {spec.name: spec for spec in specs()}
    for one in read_records(options.treated):
        fails = one["untreated"] < TRAINS * one["reference"]
        if one["name"] in known or one["name"] not in by_name or not fails:
            continue
        spec, n_runs = by_name[one["name"]], max(round(sum(one["steps"].values()) / one["planned"]), 2)
        setting, taken = repaired(spec, n_runs)
        accuracy = run(spec, setting, SEED)[0] if setting.repairs else one["untreated"]
        found = {"repairs": setting.repairs, "issue": setting.issue, "runs": taken, "allowed": n_runs}
        known[spec.name] = {"name": spec.name, "reference": one["reference"], "score": accuracy, **found}
        add_record(options.kept, known[spec.name])
        print(known[spec.name], flush=True)
    n_trained = sum(one["score"] >= TRAINS * one["reference"] for one in known.values())
    print(f"{n_trained} of {len(known)} reach {TRAINS} of their twin")


if __name__ == "__main__":
    main()
