"""Every logger gets the records it supports; one that fails loses its records, never the run."""

from __future__ import annotations

import copy
import csv
import json
import pickle
import weakref
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradientNormMonitor,
    NaNRollback,
    PercentileClipping,
    default_callbacks,
)
from lightning_gradguard.runtime.logging.hyperparameters import hyperparameters_of
from lightning_gradguard.runtime.logging.loggers import write_medium
from lightning_gradguard.runtime.logging.metrics import log_scalars
from tests.tasks import Classifier, batches, fit, poisoned

#: Two lone bad batches, a storm that needs a rollback; the last step is not one that is logged.
STORM = poisoned(batches(33), nan=[4, 12, 17, 18, 19], spikes=[9])
LAST = 32
TREES = ("pytorch_lightning", "lightning.pytorch")


def suite() -> list[Any]:
    return default_callbacks(
        gradient_norm_monitor=GradientNormMonitor(histograms=True, figure_every_n_steps=10),
        adaptive_gradient_clipping=AdaptiveGradientClipping(PercentileClipping(50.0), exclude=["net.0.bias"]),
        nan_rollback=NaNRollback(max_dossiers=0),
    )


def weather(*loggers: Any, module: pl.LightningModule | None = None) -> NaNRollback:
    """Fit through the storm; it ends between two logged steps, and not at the end of an epoch."""
    callbacks = suite()
    fit(
        module or Classifier(),
        [*STORM, *batches(9)],
        callbacks,
        logger=loggers,
        log_every_n_steps=5,
        max_steps=33,
    )
    (rollback,) = [callback for callback in callbacks if isinstance(callback, NaNRollback)]
    assert (rollback.skips, rollback.rollbacks) == (5, 1)
    return rollback


def events_in(folder: str | Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


def test_csv_gets_every_scalar(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    weather(logger)
    rows: dict[int, dict[str, str]] = defaultdict(dict)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            rows[int(row["step"])] |= {tag: value for tag, value in row.items() if value}
    assert float(rows[9]["grad_norm/total"]) > 100
    last = rows[LAST]
    assert (last["rollback/skips"], last["rollback/rollbacks"]) == ("5.0", "1.0")
    assert 0 < float(last["lr_backoff/scale"]) < 1
    assert 0 < float(last["summary/clipped_fraction"]) < 1
    largest = float(rows[9]["grad_norm/total"])  # added up on the device; the decision's on the host
    assert float(last["summary/largest_norm"]) == pytest.approx(largest, rel=1e-12)
    written = Path(logger.log_dir, "incidents.jsonl").read_text().splitlines()
    assert float(last["summary/incidents"]) == len(written) > 6


def test_tensorboard_gets_everything(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    weather(logger)
    events = events_in(logger.log_dir)
    assert "grad_norm/layers" in events.Tags()["images"]
    assert "grad_histogram/net.0.weight" in events.Tags()["histograms"]
    (told,) = events.Tensors("summary/text_summary")
    text = told.tensor_proto.string_val[0].decode()
    assert told.step == LAST
    assert "| steps skipped | 5 of " in text
    assert "| AdaptiveGradientClipping.policy | PercentileClipping(percentile=50.0, window=1000) |" in text


def test_final_counts_are_logged_once(tmp_path: Path) -> None:
    """At the last step, whether or not it is one that is logged anyway."""
    ends_logged, ends_between = TensorBoardLogger(tmp_path / "1"), TensorBoardLogger(tmp_path / "2")
    fit(Classifier(), batches(30), suite(), logger=ends_logged, log_every_n_steps=5)
    fit(Classifier(), batches(42), suite(), logger=ends_between, log_every_n_steps=50, max_steps=30)
    logged, between = events_in(ends_logged.log_dir), events_in(ends_between.log_dir)
    for tag in ("rollback/skips", "rollback/amp_overflows", "lr_backoff/scale"):
        assert [point.step for point in logged.Scalars(tag)] == [4, 9, 14, 19, 24, 29], tag
        assert [point.step for point in between.Scalars(tag)] == [29], tag
    assert [(point.step, point.value) for point in between.Scalars("summary/incidents")] == [(29, 0)]


class Tuned(Classifier):
    """Has hyperparameters, and a metric to choose them by."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(optimizer)
        self.save_hyperparameters()

    def on_train_start(self) -> None:
        logger: Any = self.logger
        logger.log_hyperparams(self.hparams, {"train_loss": 0, "rollback/skips": 0})


def hyperparameters(folder: str) -> dict[str, bytes]:
    events = events_in(folder)
    tags = events.PluginTagToContent("hparams")
    return {tag: content for tag, content in tags.items() if "session_end" not in tag}


def test_the_hyperparameters_stay_the_user_s(tmp_path: Path) -> None:
    """TensorBoard shows those that were first. A final count that the user names is a metric of theirs."""
    bare, guarded = TensorBoardLogger(tmp_path / "1"), TensorBoardLogger(tmp_path / "2")
    fit(Tuned(), batches(3), logger=bare)
    weather(guarded, module=Tuned())
    assert hyperparameters(guarded.log_dir).keys() == hyperparameters(bare.log_dir).keys() != set()
    for tag, content in hyperparameters(guarded.log_dir).items():
        assert (b"gradguard" in content, b"NaNRollback" in content) == (False, False), tag
    assert events_in(guarded.log_dir).Scalars("rollback/skips")[-1].value == 5


def test_no_hyperparameters_where_the_user_has_none(tmp_path: Path) -> None:
    """Whoever writes them after the fit must not find that others were first."""
    logger = TensorBoardLogger(tmp_path)
    weather(logger)
    with pytest.raises(KeyError):
        events_in(logger.log_dir).PluginTagToContent("hparams")


def test_without_a_logger(tmp_path: Path) -> None:
    weather()
    assert Path("incidents.jsonl").is_file()


class Service(Logger):
    """A logger of the user's, of which Lightning knows one folder for all runs."""

    name, version, save_dir = "project", "run-7", "service"

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, float] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.scalars |= metrics

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"not asked to write {params}")


class Broken(Service):
    """Has lost its connection."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        raise ConnectionError("no route to host")

    @property
    def experiment(self) -> Any:
        return self

    def add_text(self, *_: Any) -> None:
        raise ConnectionError("not to be written to")


class Silent(Classifier):
    """Logs nothing of its own, for which Lightning would let a logger that fails stop the run."""

    def log(self, *_: Any, **__: Any) -> None: ...


def test_a_logger_that_fails_costs_its_records(tmp_path: Path) -> None:
    good = CSVLogger(tmp_path)
    with pytest.warns(UserWarning, match="Broken could not write and is omitted: ConnectionError") as told:
        weather(Broken(), good, module=Silent())
    assert any("not to be written to" in str(warning.message) for warning in told)
    assert "rollback/skips" in Path(good.log_dir, "metrics.csv").read_text()


def test_a_logger_of_the_user_s_gets_scalars_and_a_folder_for_each_run() -> None:
    service = Service()
    weather(service)
    assert service.scalars["rollback/skips"] == 5
    assert Path("service", "project", "run-7", "incidents.jsonl").is_file()


def test_the_layout_of_custom_scalars(tmp_path: Path) -> None:
    logger, other = TensorBoardLogger(tmp_path), CSVLogger(tmp_path)
    trainer = pl.Trainer(logger=[other, logger], enable_progress_bar=False, accelerator="cpu")
    for step, tags in enumerate(
        (["rollback/skips"], ["rollback/skips"], ["rollback/skips", "clip/fraction"])
    ):
        log_scalars(trainer, dict.fromkeys(tags, 1.0), step)
    logger.finalize("success")
    written = events_in(logger.log_dir).Tensors("custom_scalars__config__")
    layouts = [Layout.FromString(event.tensor_proto.string_val[0]) for event in written]
    assert [len(layout.category[0].chart) for layout in layouts] == [1, 2], (
        "once for each chart that is filled"
    )


def test_arguments_of_callbacks_are_logged() -> None:
    callbacks: Sequence[object] = [
        pl.Callback(),
        NaNRollback(5, check="exact"),
        GradientNormMonitor(exclude=["head"], level="module"),
    ]
    told = {
        "callbacks": "NaNRollback, GradientNormMonitor",
        "NaNRollback.patience": 5,
        "GradientNormMonitor.exclude": "head",
        "GradientNormMonitor.level": "module",
    }
    assert hyperparameters_of(callbacks) == told
    assert hyperparameters_of([copy.deepcopy(callbacks[1])])["NaNRollback.patience"] == 5
    assert hyperparameters_of(pickle.loads(pickle.dumps(callbacks[1:]))) == told
    with pytest.raises(TypeError, match=r"NaNRollback\(\) has no argument 'patienc'"):
        NaNRollback(patienc=3)  # type: ignore[call-arg]


@pytest.mark.needs("wandb")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("tree", TREES)
def test_wandb_gets_everything(tmp_path: Path, tree: str) -> None:
    logger = import_module(f"{tree}.loggers").WandbLogger(save_dir=tmp_path, offline=True)
    weather(logger)
    run = logger.experiment
    assert run.config["gradguard"]["AdaptiveGradientClipping.exclude"] == "net.0.bias"
    shown = run.summary
    assert (shown["trainer/global_step"], shown["rollback/skips"], shown["summary/incidents"]) == (LAST, 5, 7)
    assert shown["grad_histogram/net.0.weight"]["_type"] == "histogram"
    run.finish()
    media = Path(run.dir) / "media"
    pages = [file.read_text() for file in media.glob("html/*.html")]
    assert sum("| Step | Incident |" in page for page in pages) == 7 + 1, "at each incident, and at the end"
    assert any("nonfinite loss (5)" in page for page in pages)
    assert sum("| steps skipped | 5 of " in page for page in pages) == 1
    assert len(list(media.rglob("layers*.png"))) >= 3
    (folder,) = (tmp_path / "lightning_logs").iterdir()
    assert len((folder / "incidents.jsonl").read_text().splitlines()) == 7


@pytest.mark.needs("mlflow")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("tree", TREES)
def test_mlflow_gets_all_but_histograms(tmp_path: Path, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = import_module(f"{tree}.loggers").MLFlowLogger(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    weather(logger)
    client, run = logger.experiment, logger.run_id
    record = client.get_run(run)
    assert record.data.params["gradguard/AdaptiveGradientClipping.exclude"] == "net.0.bias"
    skips = client.get_metric_history(run, "rollback/skips")
    assert (skips[-1].step, skips[-1].value) == (LAST, 5)
    assert (record.info.status, record.data.metrics["summary/incidents"]) == ("FINISHED", 7)
    texts = [file.path for file in client.list_artifacts(run, "incidents")]
    pages = [Path(client.download_artifacts(run, text)).read_text() for text in texts]
    assert sum("| Step | Incident |" in page for page in pages) == 7 + 1, "at each incident, and at the end"
    assert any("nonfinite loss (5)" in page for page in pages)
    assert len(client.list_artifacts(run, "summary")) == 1
    assert len(client.list_artifacts(run, "grad_norm/layers")) >= 3
    lines = Path("mlruns", record.info.experiment_id, run, "incidents.jsonl")
    assert [json.loads(line)["kind"] for line in lines.read_text().splitlines()].count("rollback") == 1


def test_the_pixels_of_a_figure_are_freed_once_it_is_written() -> None:
    canvases: list[weakref.ref[FigureCanvasAgg]] = []

    def add_figure(tag: str, figure: Figure, step: int) -> None:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        canvases.append(weakref.ref(canvas))

    logger = SimpleNamespace(experiment=SimpleNamespace(add_figure=add_figure))
    write_medium(logger, "figure", "heat map", Figure, 0)
    assert [canvas() for canvas in canvases] == [None]
