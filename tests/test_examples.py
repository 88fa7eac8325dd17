"""Every example runs, with the results that it claims."""

from __future__ import annotations

import inspect
import json
import math
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from examples import (
    custom_policy,
    digits,
    fine_tuning,
    gan,
    incident_listener,
    language_model,
    lightning_cli,
    own_loop,
    trainer,
    truncated_bptt,
)
from lightning_gradguard import AdaptiveGradientClipping, NaNRollback, PercentileClipping
from lightning_gradguard.cli.main import main as command_line
from lightning_gradguard.core.norms import measure_gradients
from tests.launching import ROOT, launch

EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__")
FILES = sorted((ROOT / "examples").glob("*.yaml"))

# Lightning uses methods of jsonargparse that are deprecated since
with_command_line = pytest.mark.filterwarnings(r"ignore:\s*.* was deprecated in v4")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_has_a_test(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"test_{path.stem}" in globals()
    assert f"`python examples/{path.name}" in (ROOT / "examples/README.md").read_text()
    verb = ["fit"] if path.stem == "lightning_cli" else []
    monkeypatch.setattr(sys, "argv", [str(path), *verb, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    assert end.value.code == 0
    assert re.search(r"--(trainer\.)?max_steps\b", capsys.readouterr().out)


@with_command_line
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_first_line_of_every_file_runs_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = path.read_text().splitlines()[0].removeprefix("# ")
    assert f"`{command}`" in (ROOT / "examples/README.md").read_text()
    words = [str(ROOT / word) if word.startswith("examples/") else word for word in shlex.split(command)]
    if words[0] == "python":
        del words[0]
    monkeypatch.setattr(sys, "argv", [*words, "--trainer.max_steps=2", "--trainer.enable_progress_bar=false"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    if words[0] == "lightning-gradguard":
        command_line(sys.argv[1:])
    else:
        runpy.run_path(words[0], run_name="__main__")
    saved = yaml.safe_load(Path("lightning_logs/version_0/config.yaml").read_text())
    expected = yaml.safe_load(path.read_text())["trainer"]["callbacks"]
    for entry, kept in zip(expected, saved["trainer"]["callbacks"], strict=True):
        assert kept["class_path"].endswith(entry["class_path"].rpartition(".")[2])
        assert kept["init_args"].keys() >= entry["init_args"].keys()


def test_trainer(capsys: pytest.CaptureFixture[str]) -> None:
    assert trainer.main(max_steps=150) < 0.5
    assert "4 batches skipped" in capsys.readouterr().out


@with_command_line
def test_lightning_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning_cli.py"])
    cli = lightning_cli.main(max_steps=100)
    (rollback,) = (c for c in cli.trainer.callbacks if isinstance(c, NaNRollback))  # type: ignore[attr-defined]
    (clipping,) = (c for c in cli.trainer.callbacks if isinstance(c, AdaptiveGradientClipping))  # type: ignore[attr-defined]
    assert isinstance(clipping.policy, PercentileClipping)
    assert clipping.policy.percentile == 50
    assert rollback.state_arguments == {"patience": 4}
    assert rollback.skips > 5
    printed = re.search(
        r"(\d+) batches skipped; accuracy on held-out digits (0\.\d+)", capsys.readouterr().out
    )
    assert printed is not None
    assert int(printed[1]) == rollback.skips
    assert float(printed[2]) > 0.7


@with_command_line
def test_lightning_cli_takes_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = shlex.split(" ".join(re.findall(r"`(--[^`]*)`", inspect.getdoc(lightning_cli) or "")))
    monkeypatch.setattr(sys, "argv", ["lightning_cli.py"])
    file = str(Path(lightning_cli.__file__).with_suffix(".yaml"))
    cli = lightning_cli.run(["fit", "-c", file, *flags, "--trainer.max_steps", "2"])
    callbacks = {type(c).__name__: c for c in cli.trainer.callbacks}  # type: ignore[attr-defined]
    assert callbacks["LearningRateBackoff"].state_arguments["factor"] == 0.25
    assert callbacks["NaNRollback"].state_arguments == {"patience": 5}
    assert "GradientNormMonitor" in callbacks


def test_gan(capsys: pytest.CaptureFixture[str]) -> None:
    distances = gan.main(max_steps=150)
    assert math.isnan(distances["bare"])
    assert distances["two halves of the real ones"] < distances["guarded"] < distances["noise"] / 2
    assert "6 steps of two optimizers skipped" in capsys.readouterr().out
    events = EventAccumulator("lightning_logs/version_1").Reload()
    for index in range(2):
        norms = [event.value for event in events.Scalars(f"grad_norm.{index}/total")]
        assert len(norms) > 10
        assert all(map(math.isfinite, norms))
        thresholds = [event.value for event in events.Scalars(f"clip.{index}/threshold")]
        assert len(thresholds) > 10
        assert all(0 < threshold < math.inf for threshold in thresholds)
    clipped = [any(e.value > 0 for e in events.Scalars(f"clip.{index}/fraction")) for index in range(2)]
    assert clipped == [False, True], "by histories of their own: the generator's first norms stand out"


def test_language_model() -> None:
    losses = language_model.main(max_steps=30)
    bare, guarded = losses[0.3]
    assert abs(bare - guarded) < 0.1
    bare, guarded = losses[0.7]
    assert math.isnan(bare)
    assert guarded < 10, "the text, and how soon it learns, differ between versions of Python"


def test_digits(capsys: pytest.CaptureFixture[str]) -> None:
    default, repaired = digits.main(max_steps=300)
    assert default < 0.3
    assert repaired > 0.7
    cure = "for i in range(0, 23, 2): nn.init.kaiming_normal_(model.layers[i].weight, nonlinearity='relu')"
    assert capsys.readouterr().out.count(f"cure: {cure}") == 2, "of the error, and of the warning"


def test_truncated_bptt() -> None:
    errors = truncated_bptt.main(max_steps=150)
    assert math.isnan(errors["bare"])
    assert errors["guarded"] < 0.7 * errors["guessing no change"]


def test_fine_tuning() -> None:
    accuracies = fine_tuning.main()
    assert accuracies["with the head clipped"] < 0.5
    assert accuracies["with the head excluded"] > 0.85


def test_custom_policy() -> None:
    bare, clipped = custom_policy.main(max_steps=300)
    assert bare < 0.4
    assert clipped > 0.8


def clipped_by(policy: custom_policy.LogNormClipping, norms: list[float]) -> list[float]:
    """Total norms after clipping, of steps with these norms."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    clipped = []
    for norm in norms:
        weight.grad = torch.tensor([0.6, 0.8], dtype=torch.float64) * norm
        clipped.append(float(policy.coefficients(measure_gradients([("weight", weight)]))) * norm)
        policy.commit()
    return clipped


def test_custom_policy_resumes_with_its_history() -> None:
    norms = [1.0, 1.2] * 10 + [100.0, math.nan, 0.0, 1.1]
    policy = custom_policy.LogNormClipping()
    clipped = clipped_by(policy, norms)
    bound = math.exp(math.log(1.2) / 2 + 4 * 0.1)
    assert clipped == pytest.approx([*norms[:20], bound, math.nan, 0.0, 1.1], nan_ok=True)
    # only ratios of norms matter
    scaled = clipped_by(custom_policy.LogNormClipping(), [norm * 1e6 for norm in norms])
    assert scaled == pytest.approx([norm * 1e6 for norm in clipped], nan_ok=True)
    resumed = custom_policy.LogNormClipping()
    resumed.load_state_dict(policy.state_dict())
    assert clipped_by(resumed, [50.0, 2.0]) == clipped_by(policy, [50.0, 2.0])


@with_command_line
def test_custom_policy_from_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["program"])
    snippet = (inspect.getdoc(custom_policy) or "").partition("class:\n\n")[2]
    cli = pl.cli.LightningCLI(custom_policy.Classifier, run=False, args={"trainer": yaml.safe_load(snippet)})
    (clipping,) = (c for c in cli.trainer.callbacks if isinstance(c, AdaptiveGradientClipping))  # type: ignore[attr-defined]
    assert isinstance(clipping.policy, custom_policy.LogNormClipping)
    assert clipping.policy.n_std == 3


def test_incident_listener(capsys: pytest.CaptureFixture[str]) -> None:
    posted = [json.loads(line) for line in incident_listener.main(max_steps=60)]
    assert [(incident["kind"], incident["step"]) for incident in posted] == [
        ("nonfinite_loss", 9),
        ("nonfinite_loss", 19),
        ("nonfinite_loss", 29),
    ]
    assert all(incident["text"].endswith("skipped") for incident in posted)
    assert "stopped after 30 of 60 steps" in capsys.readouterr().out


def test_own_loop(capsys: pytest.CaptureFixture[str]) -> None:
    errors = own_loop.main(max_steps=300)
    assert math.isnan(errors["bare"])
    assert errors["guarded"] < 0.5
    assert errors["resumed"] == errors["guarded"]
    # one batch in thirty is NaN; a bit flips after one of them, and costs two more
    assert "12 of 300 steps skipped, rolled back: 1" in capsys.readouterr().out


def test_own_loop_resumes_with_its_history() -> None:
    (uninterrupted, _), (resumed, _) = own_loop.train(300), own_loop.train(300, restart_at=225)
    assert resumed is not uninterrupted
    assert resumed.policy.state_dict() == uninterrupted.policy.state_dict()
    assert resumed.recovery.state_dict() == uninterrupted.recovery.state_dict()
    assert resumed.backoff.state_dict() == uninterrupted.backoff.state_dict()
    assert (resumed.skips, resumed.rollbacks) == (uninterrupted.skips, uninterrupted.rollbacks)


def test_own_loop_needs_torch_alone() -> None:
    launch(["-c", "import sys, examples.own_loop; sys.exit('pytorch_lightning' in sys.modules)"])


@pytest.mark.slow
def test_sharded_clipping(tmp_path: Path) -> None:
    source = f"import os; os.chdir({str(tmp_path)!r}); from examples.sharded_clipping import main; main(60)"
    script = tmp_path / "train.py"
    script.write_text(source)
    assert "batches skipped: 1," in launch([str(script)])
