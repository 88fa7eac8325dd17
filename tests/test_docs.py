"""The site builds without external resources, and every snippet of it runs."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import re
import shlex
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
import yaml

import lightning_gradguard
from docs.generators import experiments, guide
from docs.generators.experiments import Run
from lightning_gradguard import WeightNormConstraint
from lightning_gradguard.callbacks.defaults import DEFAULTS
from lightning_gradguard.cli.main import main as command
from lightning_gradguard.cli.parsing.lightning_cli import command_line, fit_argv

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
#: A package of the reader, which the snippets import.
MY_PACKAGE = """
from lightning_gradguard import ZScoreClipping as MyPolicy
from examples.digits import DeepNetwork as MyModule, Digits as MyData
"""


def snippets(language: str, page: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if snippets(language, page)]


@pytest.fixture(autouse=True)
def _seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets a seed: without one, LightningCLI chooses one and warns."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.fixture(autouse=True)
def _logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores the logger: snippets turn messages off, and send them to a file."""
    logger = logging.getLogger("lightning_gradguard")
    monkeypatch.setattr(logger, "handlers", logger.handlers[:])
    monkeypatch.setattr(logger, "level", logger.level)


@pytest.fixture
def my_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Creates a clone with a package of the reader, a configuration and the files of an earlier run."""
    Path("examples").symlink_to(ROOT / "examples")
    Path("my_package.py").write_text(MY_PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_package", raising=False)
    model, data = {"class_path": "my_package.MyModule"}, {"class_path": "my_package.MyData"}
    Path("config.yaml").write_text(yaml.safe_dump({"model": model, "data": data}))
    Path("treatment").mkdir()
    change = {"kind": "learning_rate", "arguments": {"scale": 0.1}}
    treatment = {"class_path": "lightning_gradguard.Treatment", "init_args": {"changes": [change]}}
    Path("treatment/treatment.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [treatment]}}))
    last_good = Path("lightning_logs/version_0/last_good.ckpt")
    last_good.parent.mkdir(parents=True)
    weights = {"net.weight": torch.zeros(1)}
    torch.save({"state_dict": weights, "pytorch-lightning_version": "2.4.0"}, last_good)


#: LightningCLI calls deprecated names of jsonargparse.
renamed = pytest.mark.filterwarnings("ignore:[\\s\\w`.]* was deprecated in v4")


def test_links_to_headings_resolve() -> None:
    headings = {
        page: {anchor(line) for line in re.findall(r"^#+ (.*)$", PAGES[page], re.M)} for page in PAGES
    }
    broken = []
    for page, text in PAGES.items():
        for target, heading in re.findall(r"\]\(([^)#\s:]*)#([^)\s.]+)\)", text):
            other = str((ROOT / page).parent.joinpath(target).resolve().relative_to(ROOT)) if target else page
            if heading not in headings.get(other, ()):
                broken.append(f"{page}: {target}#{heading}")
    assert not broken


def anchor(heading: str) -> str:
    """The anchor that Markdown gives a heading."""
    words = re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip()
    return re.sub(r"[-\s]+", "-", words)


CALLBACKS: dict[str, type] = {**DEFAULTS, "weight_norm_constraint": WeightNormConstraint}


@pytest.mark.parametrize("name", CALLBACKS)
def test_each_default_names_its_reason_and_measurement(name: str) -> None:
    rows = re.findall(r"^\| (`.*?=.*) \| .+ \| .+ \|$", PAGES[f"docs/callbacks/{name}.md"], re.M)
    documented = {argument for row in rows for argument in re.findall(r"`(\w+)=", row)}
    assert documented == set(inspect.signature(CALLBACKS[name]).parameters)


@renamed
@pytest.mark.filterwarnings("ignore:Precision .* is not supported by the model summary")
@pytest.mark.parametrize("page", pages_with("python"))
def test_python_snippets_run(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the snippets of a page one after another; the outputs that it shows are printed."""
    monkeypatch.setattr(sys, "argv", ["snippet.py"])
    names: dict[str, object] = {}
    printed = StringIO()
    with contextlib.redirect_stdout(printed):
        for match in re.finditer(r"^```(python|text)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE):
            language, snippet = match.groups()
            if language == "text":
                assert snippet.rstrip() in printed.getvalue()
            else:
                line = PAGES[page][: match.start(2)].count("\n")
                exec(compile("\n" * line + snippet, str(ROOT / page), "exec"), names)


@renamed
@pytest.mark.usefixtures("my_package")
@pytest.mark.parametrize(
    ("page", "snippet"), [(page, text) for page in pages_with("yaml") for text in snippets("yaml", page)]
)
def test_yaml_snippets_are_built(page: str, snippet: str) -> None:
    Path("snippet.yaml").write_text(snippet)
    arguments = ["--config", "config.yaml", "--config", "snippet.yaml"]
    with fit_argv(arguments):
        trainer = command_line(arguments).trainer
    built = {type(callback).__name__ for callback in trainer.callbacks}  # type: ignore[attr-defined]
    listed = yaml.safe_load(snippet).get("trainer", {}).get("callbacks", [])
    wanted = [entry["class_path"] for entry in listed]
    assert {class_path.rpartition(".")[2] for class_path in wanted} <= built


COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for page in pages_with("bash")
        for snippet in snippets("bash", page)
        for line in snippet.replace("\\\n", " ").splitlines()
        if line.startswith("lightning-gradguard ")
    }
)


@renamed
@pytest.mark.usefixtures("my_package")
@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_valid(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments of `fit` build a module and a Trainer; options of other commands exist."""
    _, verb, *arguments = shlex.split(line)
    if verb == "fit" and "--help" not in arguments:
        with fit_argv(arguments):
            assert type(command_line(arguments).model).__name__ == "DeepNetwork"
        return
    with contextlib.suppress(SystemExit):
        command([verb] if verb.startswith("--") else [verb, "--help"])
    help_page = capsys.readouterr().out
    assert help_page
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option.partition("=")[0] in help_page


@pytest.mark.slow
def test_the_site_builds_strictly_and_stands_alone(tmp_path: Path) -> None:
    """No link is broken, no page is omitted, and none loads anything from another host."""
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    site = tmp_path / "site"
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'not included in the "nav"' not in result.stderr
    for page in PAGES:
        if page.startswith("docs/") and not page.endswith("index.md"):
            assert (site / page.removeprefix("docs/").removesuffix(".md") / "index.html").exists(), page
    loads = re.compile(
        r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"?(?:https?:)?//|url\([\"']?(?:https?:)?//"
    )
    for file in (*site.rglob("*.html"), *site.rglob("*.css")):
        assert not loads.search(file.read_text()), file
    monitor = (site / "callbacks/gradient_norm_monitor/index.html").read_text()
    assert all(f"<code>{name}</code>" in monitor for name in ("norm_type", "every_n_steps", "exclude"))


def test_reference_is_complete() -> None:
    """The reference has all public names, modules and sub-packages of the core."""
    pages = "\n".join(PAGES.values())
    paths = [*(ROOT / "lightning_gradguard/core").glob("[a-z]*")]
    modules = [f"core.{path.stem}" for path in paths if path.suffix == ".py" or path.is_dir()]
    for name in (*lightning_gradguard.__all__, *modules):
        assert re.search(rf"^::: lightning_gradguard\.{name}\b", pages, re.MULTILINE), name


CURES = ("ReLU, He", "ReLU, batch norm", "ReLU, residual")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cures_of_the_guide_for_vanishing_gradients() -> None:
    bare = experiments.VANISHING["ReLU"](120, 0)
    assert bare.first_norms()[0] < bare.first_norms()[-1] / 100
    for name in CURES:
        cured = experiments.VANISHING[name](120, 0)
        assert cured.first_norms()[0] > cured.first_norms()[-1] / 10, name
        assert cured.final_loss < bare.final_loss - 0.5, name
        assert cured.accuracy > bare.accuracy + 0.3, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_cures_of_the_guide_for_exploding_gradients() -> None:
    bare = experiments.THROUGH_TIME["ReLU, gain 1.1"](25, 0)
    assert bare.survived < 25
    for name in ("clipping to norm 1", "max-norm", "LSTM", "the suite"):
        cured = experiments.THROUGH_TIME[name](25, 0)
        assert cured.survived == 25, name
        assert cured.losses[-1] < cured.losses[0], name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_out_of_range_need_clipping_and_a_bound() -> None:
    runs = {name: run(120, 0) for name, run in experiments.HUGE_WEIGHTS.items()}
    assert not math.isfinite(runs["weights from N(0, 0.4)"].final_loss)
    assert runs["clipping, max-norm"].final_loss < runs["clipping"].final_loss < math.inf
    assert runs["clipping, L2"].accuracy > runs["max-norm"].accuracy + 0.2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_guide_has_the_tables_of_its_generator(tmp_path: Path) -> None:
    """Same experiments and columns as in the page; the numbers would take minutes."""
    page = PAGES["docs/guide.md"]
    tables = {}
    for name, (runs, _, head, row) in guide.TABLES.items():
        tables[name] = guide.table(head, (row(what, [run(2, 0)]) for what, run in runs.items()))

    def form(text: str) -> list[tuple[str, int]]:
        rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
        return [(cells[0], len(cells)) for cells in rows]

    assert form(guide.written(page, tables)) == form(page)
    assert "NaN" in page


def test_guide_pictures_are_drawn(tmp_path: Path) -> None:
    """A picture of a failed and a healthy run is not empty."""
    failed = Run(losses=[4.6, 9.0, math.nan], series={"grad_norm/total": [1.0, 1e3, math.inf]})
    healthy = Run(losses=[4.6, 4.0, 3.0], series={"grad_norm/total": [1.0, 1.0, 1.0]})
    figure = guide.draw_characters({"a": failed, "b": healthy}, {"a": "tab:red", "b": "tab:blue"})
    figure.savefig(tmp_path / "picture.png")
    loss, norm = figure.axes
    assert [line.get_label() for line in loss.get_lines()] == ["a", "b"]
    assert [line.get_marker() for line in norm.get_lines()] == ["x", ""]
    for name in re.findall(r"\(images/(\w+\.png)\)", PAGES["docs/guide.md"]):
        assert (ROOT / "docs/images" / name).stat().st_size > 10_000
