"""Charts and tables of the suite in TensorBoard, requested over HTTP."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from lightning_gradguard import GradientNormMonitor, TrainingDiagnosis, default_callbacks
from lightning_gradguard.cli.demo import train
from tests.tasks import Classifier, clusters
from tests.tasks import fit as fit_quietly
from tests.tensorboard_server import Server, tensorboard

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo's network, bare and guarded."""
    logdir = tmp_path_factory.mktemp("runs")
    shared: dict[str, Any] = {"seed": 0, "max_steps": 40, "logdir": logdir}
    train("bare", [GradientNormMonitor(), TrainingDiagnosis()], **shared)
    train("guarded", default_callbacks(), **shared)
    with tensorboard(logdir) as server:
        yield server


@pytest.mark.filterwarnings("ignore")
def test_both_runs_share_their_charts(server: Server) -> None:
    layout = server.layout()
    assert list(layout) == ["Gradients", "Guard"]
    assert len(layout["Gradients"]) == len(layout["Guard"]) == 4
    assert "total norm and its usual band (log10)" in layout["Gradients"]


def test_no_chart_is_empty(server: Server) -> None:
    for charts in server.layout().values():
        for title, chart in charts.items():
            for tag in chart.get("multiline", {}).get("tag", []):
                known = server.scalar_tags("guarded")
                assert any(re.match(tag, name) for name in known), f"{title}: nothing matches {tag}"


def test_the_band_has_the_steps_that_tensorboard_insists_on(server: Server) -> None:
    (band,) = server.layout()["Gradients"]["total norm and its usual band (log10)"]["margin"]["series"]
    for run in ("bare", "guarded"):
        low, value, high = (server.scalars(run, band[part]) for part in ("lower", "value", "upper"))
        assert [s for s, _ in low] == [s for s, _ in value] == [s for s, _ in high] != []
        assert all(b <= t for (_, b), (_, t) in zip(low, high, strict=True))
    totals = server.scalars("guarded", "grad_norm/total")
    steps = [s for s, _ in totals]
    # steps before a rollback to the start are skipped; the text, and these, differ between versions of Python
    again = next((i for i, (before, step) in enumerate(pairwise(steps), 1) if step > before + 1), len(steps))
    message = "two norms make a band for the third, at the start and after the rollback"
    assert [s for s, _ in value] == [*steps[2:again], *steps[again + 2 :]], message


def test_decades_are_beside_what_shares_a_logarithmic_chart(server: Server) -> None:
    for tag in ("grad_norm/total", "grad_norm_clipped/total", "clip/threshold"):
        for (step, value), (same, decades) in zip(
            server.scalars("guarded", tag), server.scalars("guarded", f"log10/{tag}"), strict=True
        ):
            assert step == same
            assert decades == pytest.approx(math.log10(value), abs=1e-6)
    norms = [value for _, value in server.scalars("guarded", "log10/grad_norm/total")]
    assert max(norms) > 3 > 1 > norms[-1], "the explosion, and the recovery"
    assert math.isnan(server.scalars("bare", "log10/grad_norm/total")[-1][1])


def test_few_groups(server: Server) -> None:
    groups = {tag.partition("/")[0] for tag in server.scalar_tags("guarded")}
    assert groups == {
        "train_loss", "epoch", "grad_norm", "grad_norm_clipped", "weight_norm",
        "update_ratio", "clip", "rollback", "lr_backoff", "init", "log10", "summary",
    }  # fmt: skip


def test_a_heat_map_for_the_images_tab(server: Server) -> None:
    for run in ("bare", "guarded"):
        *early, shown = server.get("data/plugin/images/images", run=run, tag="grad_norm/layers", sample="0")
        assert [image["step"] for image in early] == [1, 9], "from the first logged steps on"
        picture = server.get(f"data/plugin/images/individualImage?{shown['query']}&")
        assert Image.open(io.BytesIO(picture)).width == 840
        assert shown["step"] == 39


def test_the_incidents_as_a_table(server: Server) -> None:
    assert set(server.get("data/plugin/text/tags")) == {"bare", "guarded"}
    newest = server.get("data/plugin/text/text", run="bare", tag="incidents/text_summary")[-1]
    assert "<table>" in newest["text"]
    assert "Nonfinite gradients" in newest["text"]
    assert "nn.init.orthogonal_(model.rnn.weight_hh_l0)" in newest["text"]


class Deep(pl.LightningModule):
    """Three hundred parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))) for _ in range(30)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.blocks(batch).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder: Path, *callbacks: pl.Callback, module: pl.LightningModule | None = None) -> None:
    """Train a little, with TensorBoard."""
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        callbacks=list(callbacks),
        logger=TensorBoardLogger(folder, name="", version="run"),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    samples: Any = list(torch.randn(3, 4, 2))
    trainer.fit(module or Deep(), torch.utils.data.DataLoader(samples, batch_size=None))


def test_three_hundred_parameters_do_not_make_three_hundred_charts(tmp_path: Path) -> None:
    fit(tmp_path, GradientNormMonitor())
    with tensorboard(tmp_path) as server:
        tags = server.scalar_tags("run")
        norms = {tag for tag in tags if tag.startswith("grad_norm/")}
        assert norms == {f"grad_norm/blocks.{i}-{i + 1}" for i in range(0, 30, 2)} | {
            "grad_norm/total",
            "grad_norm/nonfinite_fraction",
        }
        assert len(tags) <= 60


class Extreme(Deep):
    """Gradients of 1e30, of none, and of no element."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(nn.Linear(2, 2))
        self.empty = nn.Parameter(torch.zeros(0))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self.blocks(batch).sum() * 1e30 + self.empty.sum()
        return loss


def test_histograms_never_raise(tmp_path: Path) -> None:
    fit(tmp_path, GradientNormMonitor(histograms=True), module=Extreme())
    with tensorboard(tmp_path) as server:
        assert set(server.get("data/plugin/histograms/tags")["run"]) == {
            "grad_histogram/blocks.0.weight",
            "grad_histogram/blocks.0.bias",
        }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("depth", "first", "most"), [(2, "net.0.weight", 60), (12, "net.0", 64), (48, "net.0-2", 100)]
)
def test_a_network_has_few_scalars(depth: int, first: str, most: int) -> None:
    logger = TensorBoardLogger("logs", name="", version="run")
    hidden = [layer for _ in range(depth - 1) for layer in (nn.Linear(16, 16), nn.ReLU())]
    module = Classifier()
    module.net = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), *hidden[:-2], nn.Linear(16, 4))
    fit_quietly(module, clusters(40), default_callbacks(), logger=logger, log_every_n_steps=5)
    events = EventAccumulator("logs/run")
    events.Reload()
    scalars = events.Tags()["scalars"]
    assert len(scalars) <= most
    assert len([tag for tag in scalars if tag.startswith("init/layer_gain")]) == (depth > 2)
    assert {"log10/grad_norm_band/low", f"grad_norm/{first}", "init/gradient_gain"} <= {*scalars}
