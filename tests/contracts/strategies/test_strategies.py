"""Every strategy and precision gives the numbers and decisions of one process."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.precision import FSDPPrecision
from pytorch_lightning.strategies import ModelParallelStrategy, SingleDeviceStrategy

from docs.generators.strategies import FEATURES, StrategiesPage
from lightning_gradguard import AdaptiveGradientClipping, UnitwiseClipping, default_callbacks
from lightning_gradguard.runtime.lightning_api import UNSUPPORTED
from tests.contracts.strategies.cells import POLICIES, Cell, Seen, run
from tests.launching import launch_on
from tests.tasks import Classifier, batches, fit

#: By precision: what numbers may differ by, relative to the largest of their family, and weights, relative to
#: their norm. In half precision the gradients themselves are rounded differently when a batch is divided.
TOLERANCES = {"64": 1e-9, "32": 1e-6, "16-mixed": 0.01, "16-true": 0.01, "bf16-mixed": 0.1, "bf16-true": 0.1}
PRECISIONS = tuple(TOLERANCES)
SHARDED = ("64", "32", "bf16-mixed", "16-true", "bf16-true")
# before 2.5, Lightning gave half precisions another meaning under FSDP1: weights stay in float32
FLATTENED = SHARDED if "convert_module" in vars(FSDPPrecision) else ("64", "32")
ONE, WINDOWS, CORNERS = [(1, False)], [(1, False), (2, False)], [(1, False), (2, True)]
MODES = [(accumulate, manual) for accumulate in (1, 2) for manual in (False, True)]


def cells(
    strategy: str, precisions: tuple[str, ...], modes: Sequence[tuple[int, bool]] | None = None
) -> list[Cell]:
    """Runs of a strategy: by default every mode in float64, two that differ in both in other precisions."""
    return [
        Cell(strategy, precision, *mode)
        for precision in precisions
        for mode in modes or (MODES if precision == "64" else CORNERS)
    ]


def variants(strategy: str) -> list[Cell]:
    """Every policy, each beside another kind of norm; in float64, without differences by rounding."""
    policies = [policy for policy in POLICIES if policy != "z-score"]
    norm_types = (1.0, 3.0, math.inf, 2.0)
    return [Cell(strategy, policy=p, norm_type=n) for p, n in zip(policies, norm_types, strict=True)]


#: By line of the table: number of processes, and their runs.
GROUPS: dict[str, tuple[int, list[Cell]]] = {
    "DDP x2": (2, [*cells("DDP", PRECISIONS), *variants("DDP")]),
    "DDP x2, find_unused_parameters": (2, cells("DDP, unused parameters", ("64", "32"), CORNERS)),
    # torch itself does not accumulate under a static graph
    "DDP x2, static_graph": (2, cells("DDP, static graph", ("64", "32"), ONE)),
    "DDP x2, gradient_as_bucket_view": (2, cells("DDP, buckets as views", ("64", "32"), CORNERS)),
    "DDP x2, fp16 communication hook": (2, cells("DDP, fp16 hook", ("16-mixed",), WINDOWS)),
    "DDP x4": (4, cells("DDP", ("64", "32"), WINDOWS)),
    "FSDP2 x2": (2, [*cells("FSDP2", SHARDED), *variants("FSDP2"), Cell("FSDP2", validates=True)]),
    "FSDP2 x4": (4, [*cells("FSDP2", ("64",), WINDOWS), Cell("FSDP2", policy="unit-wise")]),
    # under manual optimization FSDP1 itself fails: it supports no backward pass within a forward pass
    "FSDP1 x2": (
        2,
        [
            *cells("FSDP1", FLATTENED, WINDOWS),
            *(variant for variant in variants("FSDP1") if variant.policy != "unit-wise"),
            Cell("FSDP1", validates=True),
        ],
    ),
    "FSDP1 x2, SHARD_GRAD_OP": (2, [Cell("FSDP1, SHARD_GRAD_OP", validates=v) for v in (False, True)]),
    "FSDP1 x2, NO_SHARD": (2, [Cell("FSDP1, NO_SHARD", validates=v) for v in (False, True)]),
    "FSDP1 x2, use_orig_params=False": (2, [Cell("FSDP1, flat", validates=v) for v in (False, True)]),
    "FSDP1 x4, HYBRID_SHARD": (4, [Cell("FSDP1, HYBRID_SHARD", validates=v) for v in (False, True)]),
    "tensor parallel x2": (2, [*cells("tensor parallel", SHARDED, ONE), *variants("tensor parallel")]),
    "FSDP2 x2, tensor parallel x2": (
        4,
        [
            *cells("FSDP2 + tensor parallel", ("64", "32", "bf16-true"), WINDOWS),
            Cell("FSDP2 + tensor parallel", policy="unit-wise"),
            Cell("FSDP2 + tensor parallel", norm_type=math.inf),
        ],
    ),
}
#: Quick groups share a launch, since starting processes takes longer than running them.
LAUNCHES = [
    ["DDP x2"],
    [
        "DDP x2, find_unused_parameters",
        "DDP x2, static_graph",
        "DDP x2, gradient_as_bucket_view",
        "DDP x2, fp16 communication hook",
    ],
    ["DDP x4", "FSDP2 x4", "FSDP1 x4, HYBRID_SHARD"],
    ["FSDP1 x2", "FSDP1 x2, SHARD_GRAD_OP", "FSDP1 x2, NO_SHARD", "FSDP1 x2, use_orig_params=False"],
    ["FSDP2 x2"],
    ["tensor parallel x2"],
    ["FSDP2 x2, tensor parallel x2"],
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("groups", LAUNCHES, ids=" and ".join)
def test_numbers_and_decisions_are_those_of_one_process(
    groups: list[str], tmp_path: Path, strategies_page: StrategiesPage
) -> None:
    (processes,) = {GROUPS[group][0] for group in groups}
    members = [(group, cell) for group in groups for cell in GROUPS[group][1]]
    torch.save([cell for _, cell in members], tmp_path / "cells.pt")
    launch_on(processes, "tests.contracts.strategies.cells", str(tmp_path), patience=240)
    verified: dict[tuple[str, str], set[str]] = defaultdict(lambda: set(FEATURES))
    for index, (group, cell) in enumerate(members):
        alone = run_alone(replace(cell, strategy="one process"))
        ranks = [load(tmp_path / f"{index}.{rank}.pt") for rank in range(processes)]
        for rank, other in enumerate(ranks[1:], 1):
            assert str(other.scalars) == str(ranks[0].scalars), f"{cell}: rank {rank} logged other numbers"
            assert (other.incidents, other.counts) == (ranks[0].incidents, ranks[0].counts), cell
        assert max(seen.collectives for seen in ranks) == 1, cell
        verified[group, cell.precision] &= agreeing(cell, ranks[0], alone)
    for (group, precision), features in verified.items():
        strategies_page.has(group, precision, [feature in features for feature in FEATURES])


@pytest.mark.slow
def test_watching_changes_nothing(tmp_path: Path) -> None:
    strategies = ("FSDP2", "tensor parallel")
    members = [
        Cell(s, p, callbacks=c) for s in strategies for p in ("64", "32") for c in ("watching", "none")
    ]
    torch.save(members, tmp_path / "cells.pt")
    launch_on(2, "tests.contracts.strategies.cells", str(tmp_path), patience=240)
    runs = [[load(tmp_path / f"{i}.{rank}.pt") for rank in range(2)] for i in range(len(members))]
    for watched, bare in zip(runs[::2], runs[1::2], strict=True):
        for one, other in zip(watched, bare, strict=True):
            assert "grad_norm/total" in one.scalars
            assert other.scalars == {}
            assert all(bool(torch.isfinite(weight).all()) for weight in one.weights.values())
            assert all(torch.equal(weight, other.weights[name]) for name, weight in one.weights.items())


@cache
def run_alone(cell: Cell) -> Seen:
    with TemporaryDirectory() as folder:
        return run(cell, Path(folder))


def load(path: Path) -> Seen:
    return Seen(**torch.load(path, weights_only=False))


def agreeing(cell: Cell, seen: Seen, alone: Seen) -> set[str]:
    """Returns the features that acted, and asserts that they acted as in one process."""
    tolerance = TOLERANCES[cell.precision]
    decisions = [i for i in seen.incidents if i[0] != "poor_initialization"]
    assert decisions == [i for i in alone.incidents if i[0] != "poor_initialization"], cell
    assert seen.counts == alone.counts, cell
    moved = max(
        float((w - alone.weights[n]).norm() / alone.weights[n].norm()) for n, w in seen.weights.items()
    )
    assert moved <= tolerance, f"{cell}: weights differ by {moved:.1e}"
    families = ["grad_norm", "clip", "grad_norm_clipped", "lr_backoff"]
    families += [] if cell.strategy == "FSDP1, flat" else ["weight_norm", "update_ratio"]
    for family in families:
        assert_close(cell, seen, alone, family, tolerance)
    skips, rollbacks, overflows, scale = seen.counts
    # FSDP1 cuts rows anywhere, and has only the first step to look at
    planted = ("gradient_profile", "enter.weight") if "FSDP1" in cell.strategy else ("symmetric_units", "up")
    did = {
        "monitor": True,  # compared above
        "clip": min(seen.scalars["clip/coefficient"].values()) < 1,
        "skip": skips + overflows >= 5,
        "rollback": rollbacks == 1,
        "backoff": scale < 1,
        "check": planted in seen.findings,
    }
    return {feature for feature, has_acted in did.items() if has_acted}


def assert_close(cell: Cell, seen: Seen, alone: Seen, family: str, tolerance: float) -> None:
    """Compares the numbers of a family, relative to the largest of them in each step."""
    # under `use_orig_params=False` there are no parameters by name
    is_flat = cell.strategy == "FSDP1, flat" and family.startswith("grad_norm")
    end = "/total" if is_flat else ""
    tags = sorted(tag for tag in alone.scalars if tag.split("/")[0] == family and tag.endswith(end))
    assert tags, f"{cell}: nothing was logged under {family}"
    assert end or tags == sorted(tag for tag in seen.scalars if tag.split("/")[0] == family), cell
    if family == "update_ratio":
        # a small difference of two weights shows rounding first, and divides by a bias that starts at zero
        tolerance *= 10
        tags = [tag for tag in tags if tag.endswith("weight") or cell.precision == "64"]
    largest: dict[int, float] = defaultdict(float)
    for tag in tags:
        for step, value in alone.scalars[tag].items():
            largest[step] = max(largest[step], abs(value) if math.isfinite(value) else 0.0)
    for tag in tags:
        assert seen.scalars[tag].keys() == alone.scalars[tag].keys(), f"{cell}: other steps of {tag}"
        for step, expected in alone.scalars[tag].items():
            value = seen.scalars[tag][step]
            both_nan = math.isnan(expected) and math.isnan(value)
            message = f"{cell}: {tag} at step {step} is {value!r}, alone {expected!r}"
            assert both_nan or abs(value - expected) <= tolerance * (largest[step] or 1.0), message


@pytest.mark.parametrize("precision", ["16-mixed"])
def test_lightning_rejects_a_grad_scaler_with_sharded_weights(
    precision: Any, strategies_page: StrategiesPage
) -> None:
    with pytest.raises(ValueError, match="16-mixed"):
        Trainer(accelerator="cpu", devices=1, strategy=ModelParallelStrategy(), precision=precision)
    for group in ("FSDP2 x2", "tensor parallel x2", "FSDP2 x2, tensor parallel x2"):
        strategies_page.has(group, precision, "unsupported by Lightning")


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_strategy_is_rejected_by_name(name: str, strategies_page: StrategiesPage) -> None:
    strategy = type(name, (SingleDeviceStrategy,), {})()
    for callback in default_callbacks():
        with pytest.raises(MisconfigurationException, match=f"{type(callback).__name__}.*{name}.*use"):
            fit(Classifier(), batches(1), [callback], strategy=strategy, accelerator="auto")
    strategies_page.has(name, "any", "unsupported")


def test_fsdp1_rejects_unitwise_clipping_and_warns() -> None:
    strategy = type("FSDPStrategy", (SingleDeviceStrategy,), {})()
    clipping = AdaptiveGradientClipping(UnitwiseClipping())
    with (
        pytest.warns(UserWarning, match="not on a GPU yet"),
        pytest.raises(MisconfigurationException, match="UnitwiseClipping needs the rows.*PerTensorClipping"),
    ):
        fit(Classifier(), batches(1), [clipping], strategy=strategy, accelerator="auto")
