"""`report` reads any event folder, in any state, and says what a person would have seen in it."""

from __future__ import annotations

import csv
import json
import math
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema  # type: ignore[import-untyped]
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from lightning_gradguard import AdaptiveGradientClipping, GradientNormMonitor, default_callbacks
from lightning_gradguard.cli import report
from lightning_gradguard.cli.demo_task import CharacterRNN, Characters
from lightning_gradguard.core.tags import meaning_of
from lightning_gradguard.report.readers.run_folders import find_runs
from lightning_gradguard.report.readers.runs import read_run
from lightning_gradguard.report.render.html import as_html
from lightning_gradguard.report.render.json import as_json
from lightning_gradguard.report.render.text import table
from lightning_gradguard.report.run_report import RunReport, outcome_in_words, report_on
from tests.tasks import Batch, Classifier, clusters, fit, poisoned

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "lightning_gradguard/report/schema.json").read_text())
NAN = math.nan
HEAD = ["run", "verdict", "survived", "final", "loss", "max", "norm", "skips", "rollbacks", "worst", "layer"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window that a report is fitted to, wherever the tests run."""
    monkeypatch.setenv("COLUMNS", "100")


class Deep(pl.LightningModule):
    """Twelve layers on digits: what becomes of them depends on activation and initialization."""

    def __init__(
        self, activation: Callable[[], nn.Module], initialize: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [64] * 13
        layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), activation())]
        self.net = nn.Sequential(*layers, nn.Linear(64, 10))
        for layer in self.net:
            if initialize is not None and isinstance(layer, nn.Linear):
                initialize(layer.weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class LSTM(pl.LightningModule):
    """Characters again, with gates."""

    def __init__(self, n_characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_characters, 32)
        self.rnn = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, n_characters)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        states, _ = self.rnn(self.embedding(batch[0]))
        loss = nn.functional.cross_entropy(self.head(states).transpose(1, 2), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=5.0)


def digits(n: int) -> list[Batch]:
    inputs, target = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randint(len(inputs), (64,), generator=generator) for _ in range(n)]
    x, y = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(target)
    return [(x[i], y[i]) for i in chosen]


def he(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


def log(
    module: pl.LightningModule, data: Sequence[Batch], callbacks: Sequence[pl.Callback], **more: Any
) -> Path:
    """A real run in the folder `run`."""
    logger = TensorBoardLogger(".", name="", version="run", default_hp_metric=False)
    fit(module, data, callbacks, logger=logger, **{"log_every_n_steps": 1, **more})
    return Path("run")


def reported(path: Path | str, name: str = "run") -> RunReport:
    return report_on(read_run(name, Path(path)))


def write(folder: str, scalars: Mapping[str, Sequence[float]], first_step: int = 0) -> Path:
    """Scalars as TensorBoard's own writer writes them; each call makes a file of its own."""
    with SummaryWriter(folder, filename_suffix=f".{first_step}") as writer:
        for tag, values in scalars.items():
            for step, value in enumerate(values, first_step):
                writer.add_scalar(tag, value, step)
    return Path(folder)


def lengthy(folder: str, tags: Sequence[str], n: int) -> Path:
    """Many points, framed by hand: the writer would take longer than all other tests together."""
    Path(folder).mkdir()
    with Path(folder, "events.out.tfevents.1").open("wb") as file:
        for step in range(n):
            values = [Summary.Value(tag=tag, simple_value=1 / (1 + step)) for tag in tags]
            record = Event(step=step, summary=Summary(value=values)).SerializeToString()
            file.write(struct.pack("<QI", len(record), 0) + record + b"\0\0\0\0")
    return Path(folder)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    report.main(arguments)
    return capsys.readouterr().out


class TestRealRuns:
    """Diagnosed as a person would, and the healthy ones left in peace."""

    def test_exploding(self) -> None:
        data = Characters(n_batches=8)
        module = CharacterRNN(len(data.alphabet))
        found = reported(log(module, [], [GradientNormMonitor()], loader=data.train_dataloader()))
        assert (found.verdict.status, found.verdict.headline) == ("dead", "exploding gradients")
        assert found.worst_layer == "rnn.weight_hh_l0"
        assert found.verdict.outcome.survived == 3
        told = " ".join(found.verdict.symptoms[0].remedies)
        assert all(
            word in told for word in ("Clip gradients", "initialization", "gated cells", "LSTM", "GRU")
        )

    def test_vanishing(self) -> None:
        found = reported(log(Deep(nn.Sigmoid, None), digits(60), [GradientNormMonitor()]))
        assert (found.verdict.status, found.verdict.headline) == ("sick", "vanishing gradients")
        assert found.worst_layer == "net.0.weight"
        assert "He initialization" in found.verdict.symptoms[0].remedies[0]

    def test_exploding_from_the_first_step(self) -> None:
        module = Deep(nn.ReLU, lambda weight: nn.init.normal_(weight, std=0.4))
        found = reported(log(module, digits(10), [GradientNormMonitor()]))
        assert found.verdict.headline == "exploding gradients"

    def test_a_bad_batch(self) -> None:
        found = reported(log(Classifier(), poisoned(clusters(40), nan=[30]), [GradientNormMonitor()]))
        assert (found.verdict.status, found.verdict.headline) == ("dead", "nonfinite loss")
        assert found.verdict.outcome.died_at == 30
        assert "NaNRollback" in " ".join(found.verdict.symptoms[0].remedies)

    def test_a_bad_batch_that_was_skipped(self, capsys: pytest.CaptureFixture[str]) -> None:
        path = log(Classifier(), poisoned(clusters(60), nan=[30, 31]), default_callbacks())
        found = reported(path)
        assert (found.verdict.status, found.verdict.headline) == ("rescued", "rescued from nonfinite loss")
        assert (found.done.skips, found.done.rollbacks) == (2, 0)
        assert dict(found.done.lost_batches) == {"skipped": 2}
        assert found.run.dossiers[0].cause == "bad_input"
        assert (path / found.run.dossiers[0].path).is_file()
        text = said(capsys, "run")
        assert "2 steps skipped, 0 rollbacks" in text
        assert "steps 30 to 31  2 times nonfinite loss, skipped" in text
        assert "cause: bad input" in text or "cause of 1: bad input" in text
        # what is in place already is not advised once more
        assert "NaNRollback()" not in text.partition("What to do")[2].partition("Timeline")[0]

    def test_stuck(self) -> None:
        module = Deep(nn.ReLU, lambda weight: nn.init.normal_(weight, std=0.01))
        found = reported(log(module, digits(110), [GradientNormMonitor()]))
        assert found.verdict.status == "sick"
        assert "stuck_loss" in {symptom.kind for symptom in found.verdict.symptoms}

    def test_healthy_digits(self) -> None:
        callbacks = [GradientNormMonitor(), AdaptiveGradientClipping()]
        found = reported(log(Deep(nn.ReLU, he), digits(150), callbacks))
        assert (found.verdict.status, found.worst_layer) == ("healthy", "")
        # which is so: the norm is 4, and the policy allows 1
        assert {symptom.kind for symptom in found.verdict.symptoms} <= {"constant_clipping"}

    def test_healthy_lstm(self) -> None:
        data = Characters(n_batches=40)
        module = LSTM(len(data.alphabet))
        found = reported(log(module, [], [GradientNormMonitor()], loader=data.train_dataloader()))
        assert (found.verdict.status, found.verdict.symptoms) == ("healthy", ())


@pytest.mark.parametrize(
    ("tag", "role", "name"),
    [
        ("grad_norm/total", "total", ""),
        ("grad_norm/body.0.weight", "layer", "body.0.weight"),
        ("grad_norm/log2", "layer", "log2"),
        ("grad_norm/x.log10", "layer", "x.log10"),
        ("summary/largest_norm", "largest", ""),
        ("summary/largest_logged_norm", "largest", ""),
        ("grad_norm.1/total", "total", ""),
        ("grad_norm/nonfinite_fraction", "nonfinite_fraction", ""),
        ("update_ratio/head", "ratio", "head"),
        ("lr_backoff/lr/0", "rate", "0"),
        ("grad_2.0_norm_total", "total", ""),
        ("grad_2.0_norm_total_step", "total", ""),
        ("grad_2.0_norm/net.0.weight", "layer", "net.0.weight"),
        ("grad_inf_norm/net.0.weight_step", "layer", "net.0.weight"),
        ("train/grad_norm", "total", ""),
        ("grad_norm", "total", ""),
        ("gradient_norm", "total", ""),
        ("global_grad_norm", "total", ""),
        ("l2_norm/grad/global", "total", ""),
        ("l2_norm/grad/net.0.weight", "layer", "net.0.weight"),
        ("l2_norm/param/net.0.weight", "weight", "net.0.weight"),
        ("train_loss", "loss", ""),
        ("train/loss", "loss", ""),
        ("loss", "loss", ""),
        ("Loss/train", "loss", ""),
        ("d_loss", "loss", ""),
    ],
)
def test_tags_of_this_package_and_of_others(tag: str, role: str, name: str) -> None:
    meaning = meaning_of(tag)
    assert meaning is not None
    assert (meaning.role, meaning.name) == (role, name)


@pytest.mark.parametrize(
    "tag",
    [
        "log10/grad_norm/total",
        "grad_norm_log10/total",
        "log2/grad_norm/total",
        "grad_norm_band/low",
        "grad_norm_band/total",
        "grad_norm_band.1/high",
        "log10/grad_norm_band/total",
        "summary/incidents",
        "summary/final_loss",
        "log10/train_loss",
        "val_loss",
        "eval/loss",
        "init/loss",
        "l2_norm/moment/net.0.weight",
        "lr_backoff/scheduled_lr/0",
        "epoch",
    ],
)
def test_what_is_no_norm_is_not_taken_for_one(tag: str) -> None:
    assert meaning_of(tag) is None


def test_the_likeliest_loss_is_taken() -> None:
    falling = [2.0 * 0.9**i for i in range(30)]
    path = write(
        "run", {"g_loss": [9.0] * 40, "train/loss": falling, "train_loss_epoch": [1.0], "val_loss": [5.0]}
    )
    assert read_run("run", path).loss_tag == "train/loss"


def test_of_two_names_of_the_loss_the_longer_series_is_taken() -> None:
    path = write("run", {"training/loss": [9.0], "train/loss": [2.0] * 30, "train_loss": [9.0] * 2})
    assert read_run("run", path).loss_tag == "train/loss"


def test_layers_are_of_one_family() -> None:
    tags = {"grad_norm/a.weight": [1.0], "grad_norm/b.weight": [1.0], "grad_2.0_norm/body": [1.0]}
    assert list(read_run("run", write("run", tags)).log.gradients[0].layers) == ["a.weight", "b.weight"]


@pytest.mark.parametrize("family", ["grad_2.0_norm", "l2_norm/grad"])
def test_others_logs_are_diagnosed(family: str) -> None:
    total = f"{family}_total" if family.startswith("grad") else f"{family}/global"
    norms = [1.0, 1.3, 700.0, 2e7, NAN]
    tags = {
        total: norms,
        f"{family}/rnn.weight_hh_l0": norms,
        f"{family}/head.weight": [1.0, 1.0, 1.0, 9.0, NAN],
    }
    found = reported(write("run", {**tags, "train/loss": [4.0, 3.9, 4.1, 90.0, NAN]}))
    assert found.verdict.headline == "exploding gradients"
    assert found.worst_layer == "rnn.weight_hh_l0"
    assert found.done.skips is None


def test_a_total_is_made_of_layers_where_there_is_none() -> None:
    run = read_run("run", write("run", {"grad_norm/a.weight": [3.0], "grad_norm/b.weight": [4.0]}))
    assert run.log.gradients[0].total.values == [5.0]


def test_scalars_that_are_tensors_are_read() -> None:
    """As TensorFlow 2 and `tensorboard.summary` write them."""
    tensors = [
        TensorProto(dtype=1, float_val=[3.0]),
        TensorProto(dtype=2, tensor_content=struct.pack("<d", 4.0)),
        TensorProto(dtype=1, float_val=[1.0, 2.0]),
    ]
    Path("run").mkdir()
    with Path("run/events.out.tfevents.1").open("wb") as file:
        for step, tensor in enumerate(tensors):
            value = Summary.Value(tag="grad_norm", tensor=tensor)
            record = Event(step=step, summary=Summary(value=[value])).SerializeToString()
            file.write(struct.pack("<QI", len(record), 0) + record + bytes(4))
    assert read_run("run", Path("run")).log.gradients[0].total.values == [3.0, 4.0]


def test_several_optimizers() -> None:
    tags = {f"grad_norm.{i}/{name}": [1.0] * 20 for i in range(2) for name in ("total", "body.weight")}
    found = reported(write("run", {**tags, "d_loss": [1.0] * 20}))
    assert len(found.run.log.gradients) == 2
    assert [layer.optimizer for layer in found.layers] == [0, 1]
    assert "body.weight (optimizer 1)" in as_html([found])


def test_optimizers_keep_their_numbers() -> None:
    tags = {f"grad_norm.{i}/{name}": [1.0] * 20 for i in (1, 3) for name in ("total", "body.weight")}
    found = reported(write("run", tags))
    assert [layer.optimizer for layer in found.layers] == [1, 3]
    page = as_html([found])
    assert "Total gradient norm of optimizer 3" in page
    assert "optimizer 0" not in page


def test_the_largest_norm_of_all_steps_is_told_beside_that_of_logged_ones() -> None:
    norms = [0.5, 0.564, 0.4]
    found = reported(write("run", {"grad_norm/total": norms, "summary/largest_norm": [1.16]}))
    assert "largest gradient norm 1.16 (0.564 among logged steps, at step 1)" in outcome_in_words(found)
    assert [layer.name for layer in found.layers] == []
    same = reported(write("same", {"grad_norm/total": norms, "summary/largest_logged_norm": [0.5640001]}))
    assert outcome_in_words(same) == "3 steps, largest gradient norm 0.564 at step 1"


def test_what_is_unknown_is_not_called_nonfinite(capsys: pytest.CaptureFixture[str]) -> None:
    write("runs/norms", {"grad_norm/total": [1.0] * 20})
    Path("runs/told").mkdir()
    Path("runs/told/incidents.jsonl").write_text('{"kind": "loss_spike", "step": 3}\n')
    _, norms, told = said(capsys, "runs").splitlines()[:3]
    assert re.split(r" {2,}", norms)[2:] == ["20 of 20", "-", "1", "-", "-", "-"]
    assert re.split(r" {2,}", told)[2:] == ["-"] * 6
    first, second = json.loads(said(capsys, "runs", "--json"))["runs"]
    assert (first["final_loss"], first["first_loss"], second["survived"]) == (None, None, None)


def test_a_death_that_nobody_saw() -> None:
    Path("run").mkdir()
    with SummaryWriter("run") as writer:
        for step in (49, 99, 149):
            writer.add_scalar("train_loss", NAN, step)
    found = reported("run")
    words = "died within the first 49 of 150 steps, which were not logged"
    assert outcome_in_words(found) == words
    jsonschema.validate(json.loads(as_json([found])), SCHEMA)


def test_too_little_is_said_with_what_to_do_and_what_is_certain(capsys: pytest.CaptureFixture[str]) -> None:
    tags = {"grad_norm/total": [3e6] * 3, "train_loss": [2.0] * 3, "clip/coefficient": [1e-6] * 3}
    write("run", {**tags, "clip/fraction": [1.0] * 3})
    text = " ".join(said(capsys, "run").split())
    assert "too little was logged to judge" in text
    assert "log more often, or train for longer, to have it judged: Trainer(log_every_n_steps=10)" in text
    assert "hard clipping all the time (minor, from step 1)" in text
    assert "largest gradient norm 3e+06" in text


def table_of(folder: str, columns: Mapping[str, Sequence[float]]) -> Path:
    """The same scalars as CSVLogger writes them: a blank where a step has none."""
    Path(folder).mkdir(parents=True)
    longest = max(map(len, columns.values()))
    with Path(folder, "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", *columns])
        for step in range(longest):
            values = [v[step] if step < len(v) else "" for v in columns.values()]
            writer.writerow([0, step, *values])
            writer.writerow([0, step, *[""] * len(columns)])
    return Path(folder)


def test_the_metrics_of_a_csv_logger_are_read_like_event_files() -> None:
    norms = [1.0, 1.25, 512.0, 2.0**24, NAN]
    tags = {"grad_norm/total": norms, "grad_norm/a.weight": norms, "train_loss": [4.0, 3.5, 4.5, 90.0, NAN]}
    from_table, from_events = (
        json.loads(as_json([reported(make(name, tags), "run")]))["runs"][0]
        for make, name in ((table_of, "table"), (write, "events"))
    )
    assert from_table.pop("path") != from_events.pop("path")
    assert from_table == from_events
    assert from_table["headline"] == "exploding gradients"


def test_a_real_run_with_a_csv_logger() -> None:
    logger = CSVLogger(".", name="", version="run")
    fit(
        Classifier(),
        poisoned(clusters(40), nan=[30]),
        default_callbacks(),
        logger=logger,
        log_every_n_steps=1,
    )
    found = reported("run")
    assert (found.verdict.headline, found.verdict.outcome.steps) == ("rescued from nonfinite loss", 40)
    assert found.done.skips == 1
    assert list(find_runs([Path()])) == ["run"]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("a,b\n1,2\n", "has no column named step"),
        ("", "has no column named step"),
        ("step,train_loss\nx,1\n1.5,1\n,1\n3\n4,odd\n5,1,7\n", ""),
    ],
)
def test_odd_tables(text: str, note: str) -> None:
    Path("run").mkdir()
    Path("run/metrics.csv").write_text(text)
    found = reported("run")
    assert any(note in line for line in found.notes)
    assert list(found.run.log.loss.steps) == ([] if note else [5])


def test_a_stray_file_does_not_hide_the_runs_below_it() -> None:
    write("top", {"hp_metric": [-1.0]})
    for name in ("version_0", "version_1"):
        write(f"top/{name}", {"train_loss": [1.0] * 5})
    assert list(find_runs([Path("top")])) == ["version_0", "version_1"]
    # a run of its own is one
    write("top", {"train_loss": [1.0]}, first_step=1)
    assert list(find_runs([Path("top")])) == ["top"]


def test_all_ranks_that_lost_batches_are_counted() -> None:
    path = write("run", {"train_loss": [1.0] * 20, "rollback/skips": [0.0] * 19 + [6.0]})
    for rank in range(2):
        lines = [json.dumps({"reason": "skipped"})] * 6
        (path / f"lost_batches.rank{rank}.jsonl").write_text("\n".join(lines))
    assert reported(path).done.sentences()[:2] == [
        "6 steps skipped, 0 rollbacks",
        "12 batches of 2 ranks together left nothing in the weights (12 skipped): lost_batches.rank*.jsonl",
    ]


def test_incidents_between_logged_steps_are_on_the_chart() -> None:
    path = write("run", {"train_loss": [1.0] * 20}, first_step=49)
    lines = [{"kind": "poor_initialization", "step": 0}, {"kind": "loss_spike", "step": 99}]
    (path / "incidents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (chart,) = charts(as_html([reported(path)]))
    marks = chart.findall("path[@class='mark']")
    assert [re.findall(r"M(\d+)", mark.get("d", "")) for mark in marks] == [["63"], ["789"]]


def test_a_loss_alone_is_judged_and_what_to_add_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    write("run", {"train/loss": [4.6, 3.9, 1.2e14, NAN]})
    text = said(capsys, "run")
    assert "run: divergence" in text
    assert "the verdict rests on train/loss alone; add GradientNormMonitor()" in text


def test_neither_torch_nor_lightning_is_loaded() -> None:
    write("run", {"grad_norm/total": [1.0] * 20, "train_loss": [2.0 * 0.9**i for i in range(20)]})
    code = (
        "import sys; from lightning_gradguard.cli.main import main;"
        "main(['report', 'run', '--html', 'page.html']);"
        "heavy = {'torch', 'pytorch_lightning', 'lightning', 'numpy', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )
    assert result.returncode == 0, result.stderr
    assert "run: healthy" in result.stdout
    assert "\x1b" not in result.stdout


def test_json_keeps_to_its_schema(capsys: pytest.CaptureFixture[str]) -> None:
    log(Classifier(), poisoned(clusters(40), nan=[30]), default_callbacks())
    write("bare", {"grad_norm/total": [1.0, 1e9, math.inf, NAN], "train_loss": [1.0, 2.0, NAN, NAN]})
    content = json.loads(
        said(capsys, "run", "bare", "--json"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    validator = jsonschema.Draft202012Validator(SCHEMA)
    validator.check_schema(SCHEMA)
    validator.validate(content)
    run, bare = content["runs"]
    assert (run["status"], bare["status"]) == ("rescued", "dead")
    assert bare["final_loss"] == "nan"
    assert run["done"]["skips"] == 1
    # a field that nobody has described would be one
    content["runs"][0]["surprise"] = 1
    assert not validator.is_valid(content)


def test_json_to_a_file_and_ahead_of_the_folder(capsys: pytest.CaptureFixture[str]) -> None:
    write("run", {"train_loss": [1.0] * 5})
    assert "run: too little was logged to judge" in said(capsys, "run", "--json", "report.json")
    written = json.loads(Path("report.json").read_text())
    assert json.loads(said(capsys, "--json", "run")) == written


class Page(HTMLParser):
    """Tags that are open, what a page would fetch, and where it leads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        seen = [str(value) for name, value in attrs if name in ("src", "href", "data")]
        (self.links if tag == "a" else self.fetched).extend(seen)


def charts(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def test_the_page_shows_everything_and_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    path = log(Classifier(), poisoned(clusters(60), nan=[30, 31]), default_callbacks())
    Path("pages").mkdir()
    said(capsys, "run", "--html", "pages/page.html")
    text = Path("pages/page.html").read_text()
    page = Page(text)
    assert page.links == ["../run/incidents/30/index.html"]
    assert Path("pages", page.links[0]).is_file()
    assert not page.fetched
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    loss, norms, layers = charts(text)
    marks = [mark.findtext("title") for mark in loss.findall("path[@class='mark']")]
    assert marks == ["step 30: nonfinite loss", "step 31: nonfinite loss"]
    assert [line.get("class") for line in norms.findall("path")][:3] == ["l a", "l b", "l c"]
    names = {element.findtext("title") for element in layers.findall("text")}
    assert {"net.0.weight", "net.6.bias"} <= names
    assert reported(path).run.dossiers[0].path in text
    assert "prefers-color-scheme:dark" in text


def test_stretches_of_nonfinite_values_are_marked() -> None:
    losses = [*[1.0] * 40, NAN, *[1.0] * 39, *[NAN] * 20]
    page = as_html([reported(write("run", {"train_loss": losses}))])
    (chart,) = charts(page)
    widths = [float(bar.get("width", "")) for bar in chart.findall("rect[@class='sick']")]
    assert widths == pytest.approx([2.0, 2.0 + (788 - 62) * 19 / 99], abs=0.2)
    assert "NaN or infinite" in page
    # two pieces of line, with a gap between them
    assert chart.find("path").get("d", "").count("M") == 2  # type: ignore[union-attr]


def test_nonfinite_cells_of_the_heat_map_are_marked() -> None:
    n = 100
    tags = {
        f"grad_norm/layer{i}.weight": [*[10.0**-i] * (n - 1), NAN if i == 2 else 10.0**-i] for i in range(5)
    }
    _, layers = charts(as_html([reported(write("run", tags))]))
    (sick,) = layers.findall("path[@class='sick']")
    (shape,) = re.findall(r"M([\d.]+) (\d+)H([\d.]+)", sick.get("d", ""))
    assert float(shape[2]) == pytest.approx(788.0)
    assert (int(shape[1]) - 14) / 15 == 2
    # every other cell is painted: none is lost between two columns
    painted = sum(
        float(right) - float(left)
        for path in layers.findall("path")
        for left, right in re.findall(r"M([\d.]+) \d+H([\d.]+)", path.get("d", ""))
    )
    assert painted == pytest.approx(5 * (788 - 210), abs=1)


def test_names_with_markup_are_escaped() -> None:
    tags = {"grad_norm/<script>alert(1)</script>.weight": [1.0, 2.0], "grad_norm/total": [1.0, 2.0]}
    path = write("run", tags)
    incidents = {"kind": "<b>odd</b>", "step": 1, "where": ["<i>x</i>"], "detail": "a & b"}
    (path / "incidents.jsonl").write_text(json.dumps(incidents))
    (path / "hparams.yaml").write_text("title: <u>x</u>\n")
    page = as_html([reported(path, "<em>run</em>")])
    assert not {"script", "b", "u", "em"} & set(Page(page).tags)
    assert "<script>" not in page
    assert len(charts(page)) == 2


class TestRobustness:
    """Whatever is in the folder, there is a report or one short message."""

    def test_an_empty_event_file(self) -> None:
        Path("run").mkdir()
        Path("run/events.out.tfevents.1").touch()
        found = reported("run")
        assert found.verdict.status == "unknown"
        assert any("is empty" in note for note in found.notes)
        assert any("neither a loss nor a gradient norm" in note for note in found.notes)
        as_html([found])

    @pytest.mark.parametrize(
        "values", [[1.0], [NAN], [NAN] * 200, [0.0] * 30, [math.inf, -math.inf], [1e-45, 3e38]]
    )
    def test_odd_values(self, values: list[float]) -> None:
        tags = {"grad_norm/total": values, "grad_norm/a.weight": values, "train_loss": values}
        found = reported(write("run", tags))
        jsonschema.validate(json.loads(as_json([found])), SCHEMA)
        assert len(charts(as_html([found]))) == 3

    def test_a_file_that_is_cut_off_is_read_as_far_as_it_goes(self) -> None:
        path = write("run", {"train_loss": [2.0 * 0.9**i for i in range(50)]})
        (file,) = path.iterdir()
        file.write_bytes(file.read_bytes()[:-20])
        found = reported(path)
        assert len(found.run.log.loss) == 49
        assert any("cut off or damaged after 50 records" in note for note in found.notes)

    def test_a_file_that_is_something_else(self) -> None:
        Path("run").mkdir()
        Path("run/events.out.tfevents.1").write_bytes(struct.pack("<QI", 8, 0) + b"\xff" * 12)
        Path("run/events.out.tfevents.2").write_text("this is no event file, it only has the name of one")
        notes = reported("run").notes
        assert any("tfevents.1 is damaged after 0 records" in note for note in notes)
        assert any("tfevents.2 is cut off or damaged after 0 records" in note for note in notes)

    def test_a_resumed_run_counts_as_it_went_on(self) -> None:
        losses = [2.0 * 0.95**i for i in range(60)]
        write("run", {"train_loss": [*losses[:40], *[NAN] * 20]})
        write("run", {"train_loss": losses[30:45]}, first_step=30)
        found = reported("run")
        assert list(found.run.log.loss.steps) == list(range(45))
        assert found.verdict.status == "healthy"
        assert any("steps from 30 on were logged again" in note for note in found.notes)

    def test_several_files_are_one_run(self) -> None:
        write("run", {"train_loss": [1.0] * 20})
        write("run", {"train_loss": [0.5] * 20}, first_step=20)
        assert len(read_run("run", Path("run")).log.loss) == 40

    def test_broken_lines_of_incidents(self) -> None:
        path = write("run", {"train_loss": [1.0] * 20})
        lines = ['{"kind": "rollback", "step": 3, "value": "nan"}', '{"kind": "roll', "[]", '{"kind": "x"}']
        (path / "incidents.jsonl").write_text("\n".join(lines) + "\n")
        found = reported(path)
        assert dict(found.incidents) == {"rollback": 1}
        assert "2 lines of incidents.jsonl could not be read" in found.notes
        assert "1 records of incidents.jsonl are no incidents" in found.notes

    def test_incidents_alone_are_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("run").mkdir()
        Path("run/incidents.jsonl").write_text('{"kind": "loss_spike", "step": 3}\n')
        text = said(capsys, "run")
        assert "there is neither an event file nor a metrics.csv, only incidents.jsonl" in " ".join(
            text.split()
        )
        assert "loss_spike 1" in text

    def test_incidents_of_a_part_that_was_abandoned(self) -> None:
        """A run that was given up, resumed from step 50 in the same folder, and went well."""
        losses = [2.0 * 0.98**i for i in range(150)]
        path = write("run", {"train_loss": losses[:100], "rollback/skips": [0.0] * 100})
        write("run", {"train_loss": losses[50:], "rollback/skips": [0.0] * 100}, first_step=50)
        old = [("loss_spike", 20, "none"), ("nonfinite_loss", 70, "skipped")]
        old += [("nonfinite_loss", 98, "skipped"), ("training_diverged", 99, "stopped")]
        again = [("nonfinite_loss", 70, "skipped"), ("loss_spike", 120, "none")]

        def tell(incidents: list[tuple[str, int, str]]) -> RunReport:
            lines = [json.dumps({"kind": k, "step": s, "action": a}) for k, s, a in incidents]
            (path / "incidents.jsonl").write_text("\n".join(lines))
            return reported(path)

        alone = tell(old)
        assert (alone.verdict.status, dict(alone.incidents)) == ("healthy", {"loss_spike": 1})
        late = tell([*old[:3], ("training_diverged", 100, "stopped")])
        assert (late.verdict.status, dict(late.incidents)) == ("healthy", {"loss_spike": 1})
        elsewhere = tell([*old, ("nonfinite_gradient", 60, "skipped")])
        assert dict(elsewhere.incidents) == {"loss_spike": 1, "nonfinite_gradient": 1}
        same = tell([old[1], again[0]])
        assert dict(same.incidents) == {"nonfinite_loss": 1}
        repeated = tell([*old, *again])
        assert repeated.verdict.headline == "rescued from nonfinite loss"
        assert dict(repeated.incidents) == {"loss_spike": 2, "nonfinite_loss": 1}

    def test_numbers_that_are_none(self) -> None:
        tags = {"train_loss": [1.0] * 20, "rollback/skips": [1.0, NAN], "rollback/rollbacks": [NAN, NAN]}
        path = write("run", tags)
        lines = ['{"kind": "rollback", "step": Infinity}', '{"kind": "rollback", "step": NaN}']
        (path / "incidents.jsonl").write_text("\n".join(lines))
        (path / "hparams.yaml").write_text("d: 2024-02-30\n")
        found = reported(path)
        assert (found.done.skips, found.done.rollbacks) == (1, None)
        assert "2 records of incidents.jsonl are no incidents" in found.notes
        assert any("hparams.yaml" in note for note in found.notes)

    def test_hparams_that_are_no_plain_values(self) -> None:
        path = write("run", {"train_loss": [1.0] * 20})
        (path / "hparams.yaml").write_text("a: !!python/object/apply:os.system ['echo']\n")
        found = reported(path)
        assert found.run.hparams == {}
        assert any("hparams.yaml" in note for note in found.notes)

    def test_a_hundred_thousand_steps(self) -> None:
        path = lengthy("run", ["grad_norm/total", "grad_norm/a.weight", "train_loss"], 100_000)
        found = reported(path)
        assert found.verdict.status == "healthy"
        assert found.verdict.outcome.steps == 100_000
        page = as_html([found])
        assert len(page) < 100_000


def test_incidents_are_folded() -> None:
    path = write("run", {"train_loss": [1.0] * 2000})
    lines = []
    for start in range(0, 2000, 50):
        lines += [{"kind": "nonfinite_loss", "step": start + i, "action": "skipped"} for i in range(3)]
        lines += [{"kind": "rollback", "step": start + 3, "value": float(start), "action": "rolled_back"}]
    (path / "incidents.jsonl").write_text("\n".join(map(json.dumps, lines)))
    timeline = reported(path).timeline
    assert len(timeline) <= 13
    counted = [int(n) for entry in timeline for n in re.findall(r"(\d+) times nonfinite loss", entry.text)]
    assert sum(counted) == 120
    (path / "incidents.jsonl").write_text("\n".join(map(json.dumps, lines[:4])))
    first, second = [entry.text for entry in reported(path).timeline if "stuck" not in entry.text]
    assert (first, second) == ("3 times nonfinite loss, skipped", "rollback to the weights of step 0")


def test_counters_tell_what_incidents_do_not() -> None:
    skips = [0.0] * 40 + [float(i) for i in range(1, 13)] + [12.0] * 20
    path = write("run", {"rollback/skips": skips, "train_loss": [0.97**i for i in range(72)]})
    (entry,) = reported(path).timeline
    assert (entry.first_step, entry.last_step, entry.text) == (40, 51, "12 times skipped")


def test_runs_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    write("runs/version_10", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    write("runs/version_9", {"train_loss": [4.0, 3.0, 1e9, NAN], "grad_norm/total": [1.0, 1.0, 1e9, NAN]})
    write("runs/deep/er/run", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    head, *rows = said(capsys, "runs").splitlines()[:4]
    assert head.split() == HEAD
    assert [row.split()[0] for row in rows] == ["deep/er/run", "version_9", "version_10"]
    assert "exploding gradients  3 of 4" in rows[1]
    assert list(find_runs([Path("runs/version_9"), Path("runs/version_10")])) == ["version_9", "version_10"]
    # two runs of one name are told apart by their paths
    write("other/version_9", {"train_loss": [1.0]})
    names = list(find_runs([Path("runs/version_9"), Path("other/version_9")]))
    assert names == ["runs/version_9", "other/version_9"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_no_line_is_wider_than_the_window(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    name = "encoder.layers.11.self_attention.output_projection.weight"
    tags = {f"grad_norm/{name}": [1.0, 1e9, NAN], "train_loss": [4.0, 3.0, NAN]}
    write("a_run_with_quite_a_long_name_of_its_own", tags)
    write("another", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    for text in (said(capsys, "another"), said(capsys, "a_run_with_quite_a_long_name_of_its_own", "another")):
        assert max(map(len, text.splitlines())) <= width


def test_a_table_is_narrowed_and_then_turned() -> None:
    rows = [("run", "verdict", "loss"), ("first_of_the_runs", "exploding gradients", "1.0")]
    assert table(rows, 100)[1] == "first_of_the_runs  exploding gradients  1.0"
    assert table(rows, 36, flexible=(0, 1))[1] == "first_…he_runs  exploding gra…  1.0"
    assert table(rows, 27, flexible=(0, 1)) == ["run      first_of_the_runs", "verdict  exploding", *TURNED]


TURNED = ["         gradients", "loss     1.0"]


WRONG_INPUTS: list[tuple[tuple[str, ...], str]] = [
    (("runs/version_1",), "there is no folder runs/version_1. Did you mean runs/version_0?"),
    (("rnus",), "there is no folder rnus. Did you mean runs?"),
    (("empty",), "there is neither an event file nor a metrics.csv in empty, nor in a folder below it."),
    (("runs/empty",), "There are runs nearby: runs/version_0."),
    (("runs/version_0/notes.txt",), "is a file; name the folder that it is in: runs/version_0"),
    ((), "name the folder of a run"),
    (("runs", "--html", "missing/page.html"), "missing/page.html cannot be written: No such file"),
    (("runs", "--htlm", "x"), "unrecognized arguments: --htlm"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG_INPUTS)
def test_wrong_input_is_one_short_message_and_code_two(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("runs/version_0", {"train_loss": [1.0]})
    Path("runs/version_0/notes.txt").touch()
    Path("runs/empty").mkdir()
    Path("empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) <= 12


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    write("run", {"train_loss": [1.0] * 20})
    command = f"{sys.executable} -m lightning_gradguard report run | true"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "lightning-gradguard report lightning_logs/version_0" in text
    assert all(option in text for option in ("RUN_DIR", "--html FILE", "--json [FILE]"))
