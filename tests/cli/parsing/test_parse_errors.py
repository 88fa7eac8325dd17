"""Wrong input ends with code 2 and one line, which names the option, the value and the nearest valid name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Optional, Union

import pytest
import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentError

from lightning_gradguard.cli.parsing.parse_errors import parse_error_message
from lightning_gradguard.cli.replay import argument_parser
from tests.cli.conftest import Command

MODULE = ("--model", "mine.Net", "--data", "mine.Data", "--seed_everything=0")


def usage_error(command: Command, *arguments: str) -> str:
    """Returns the message about wrong input."""
    code, out, err = command("fit", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("lightning-gradguard fit: ")
    assert err.count("\n") == 1
    assert len(err) < 500
    assert not Path("lightning_logs").exists()
    return err.removeprefix("lightning-gradguard fit: ").rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model mine.Nett", "--model mine.Nett: mine.Nett does not exist. Did you mean mine.Net?"),
        ("--model mine:Net", "--model mine:Net: a dot is before the name of a class. Did you mean mine.Net?"),
        ("--model mine.Net --width 3", "there is no --width. Did you mean --model.width?"),
        ("--model mime.Net", "--model mime.Net: there is no module mime. Did you mean mine?"),
        ("--model=mine.Data", "--model mine.Data: mine.Data is no LightningModule."),
        ("--data mine.Dat", "--data mine.Dat: mine.Dat does not exist. Did you mean mine.Data?"),
        ("--data mine.Net", "--data mine.Net: mine.Net is no LightningDataModule."),
        (
            "--model broken.Net",
            "--model broken.Net: importing broken failed with ModuleNotFoundError: No module named 'absent'",
        ),
        (
            "--model unclosed.Net",
            "--model unclosed.Net: importing unclosed failed with SyntaxError: '(' was never closed (",
        ),
        ("--model mine.Fails", "mine.Fails could not be built: RuntimeError: no such table (mine.py, line "),
        (
            "--model.widht 3",
            "--model.widht: mine.Net takes no such argument. Did you mean --model.width?",
        ),
        (
            "--model mine.NeedsWidth",
            "mine.NeedsWidth needs --model.width.",
        ),
        (
            "--model mine.Sized --model.size.widht 3",
            "--model.size.widht: mine.Size takes no such argument. Did you mean --model.size.width?",
        ),
        (
            "--model mine.Sized --model.size.q 3",
            "--model.size.q: mine.Size takes no such argument. There are: width.",
        ),
        ("--data.length 3", "--data.length: mine.Data takes no such argument. There are: size."),
        ("--model.width x", "--model.width x: expected int."),
        ("--trainer.max_step 5", "there is no --trainer.max_step. Did you mean --trainer.max_steps?"),
        ("--trainer.max_steps abc", "--trainer.max_steps abc: expected int."),
        ("--trainer.max_steps=abc", "--trainer.max_steps abc: expected int."),
        ("--trainer.accelerator cpuu", "the Trainer could not be built: You selected an invalid accelerator"),
        ("--nan_rollbak null", "there is no --nan_rollbak. Did you mean --nan_rollback?"),
        ("--nan_rollback.patience -1", "NaNRollback: patience=-1 must be a whole number of at least 1."),
        ("--nan_rollback.patience x", "--nan_rollback.patience x: expected int."),
        (
            "--nan_rollback.patienc 5",
            "--nan_rollback.patienc: lightning_gradguard.NaNRollback takes no such argument. "
            "Did you mean --nan_rollback.patience?",
        ),
        (
            "--nan_rollback false",
            "--nan_rollback false: this takes null, to omit it, or a subclass of NaNRollback.",
        ),
        ("--optimizer Adamm", "--optimizer Adamm: there is no such class. Did you mean Adam?"),
        (
            "--adaptive_gradient_clipping 5",
            "--adaptive_gradient_clipping 5: this takes null, to omit it, or a subclass of "
            "AdaptiveGradientClipping.",
        ),
        (
            "--adaptive_gradient_clipping.policy.percentile 20",
            "--adaptive_gradient_clipping.policy.percentile: name the class first, as "
            "--adaptive_gradient_clipping.policy PercentileClipping.",
        ),
        (
            "--trainer.logger.save_dir x",
            "--trainer.logger.save_dir: name the class first, as --trainer.logger C",  # of some logger
        ),
        (
            "--trainer.callbacks+=NaNRolback",
            "--trainer.callbacks NaNRolback: there is no such class. Did you mean NaNRollback?",
        ),
        ("--trainer.callbacks+=mine.Net", "--trainer.callbacks mine.Net: mine.Net is no Callback."),
        (
            "--adaptive_gradient_clipping.policy=UnitwiseCliping",
            "--adaptive_gradient_clipping.policy UnitwiseCliping: there is no such class. "
            "Did you mean UnitwiseClipping?",
        ),
        ("stray", "stray belongs to no option."),
        ("-c nope.yaml", "--config nope.yaml cannot be read: there is no such file."),
        (
            "-c confg.yaml",
            "--config confg.yaml cannot be read: there is no such file. Did you mean config.yaml?",
        ),
        ("-c broken.py", "--config broken.py holds no options; it needs lines such as `trainer:`."),
        ("-c", "argument -c/--config: expected one argument"),
    ],
)
def test_flags(mine: Path, command: Command, arguments: str, message: str) -> None:
    Path("broken.py").write_text("import absent\n")
    Path("unclosed.py").write_text("f(\n")
    Path("config.yaml").write_text("")
    assert usage_error(command, *MODULE, *arguments.split()).startswith(message)


def test_literal_lists_choices(mine: Path, command: Command) -> None:
    message = usage_error(command, *MODULE, "--nan_rollback.check", "exat")
    assert message.startswith("--nan_rollback.check exat: expected ")
    assert "'exact', 'deferred'" in message
    assert message.endswith(" Did you mean exact?")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"trainer": {"max_step": 7}},
            "wrong.yaml: there is no trainer.max_step. Did you mean trainer.max_steps?",
        ),
        ({"trainers": {"max_steps": 7}}, "wrong.yaml: there is no trainers. Did you mean trainer?"),
        ({"trainer": {"max_steps": "x"}}, "wrong.yaml: trainer.max_steps x: expected int."),
        (
            {"model": {"class_path": "mine.Nett"}},
            "wrong.yaml: model mine.Nett: mine.Nett does not exist. Did you",
        ),
        (
            {"model": {"class_path": "mine.Net", "init_args": {"width": "x"}}},
            "wrong.yaml: model.width x: expected int.",
        ),
        (
            {"model": {"class_path": "mine.Net", "width": 3}},
            "wrong.yaml: model: beside `class_path`, arguments belong under `init_args`.",
        ),
        (
            {"nan_rollback": {"patienc": 3}},
            "wrong.yaml: nan_rollback.patienc: lightning_gradguard.NaNRollback takes no such argument. "
            "Did you mean nan_rollback.patience?",
        ),
        ({"model": {"class_path": "mine.NeedsWidth"}}, "mine.NeedsWidth needs --model.width."),
        ({"nan_rollback": False}, "wrong.yaml: nan_rollback false: this takes null, to omit it, or a"),
        ({"nan_rollback": 5}, "wrong.yaml: nan_rollback 5: this takes null, to omit it, or a"),
        (
            {"adaptive_gradient_clipping": {"policy": {"percentile": 20}}},
            "wrong.yaml: adaptive_gradient_clipping.policy: name the class, as `class_path: Per",
        ),
        ({"trainer": None}, "wrong.yaml: trainer null: this takes arguments, such as `max_epochs: 10`."),
        ({"trainer": 5}, "wrong.yaml: trainer 5: this takes arguments, such as `max_epochs: 10`."),
        ({"model": [1]}, "wrong.yaml: model [1]: this takes the path of a class, as my.Module."),
        ({"fit": "model"}, "wrong.yaml: there is no fit."),
        ({"fit": {"model": "mine.Own"}}, "wrong.yaml: there is no fit."),
        ("trainer: {max_steps: 7\nmodel: [", "--config wrong.yaml, line 2 is no YAML: "),
    ],
)
def test_files(mine: Path, command: Command, content: object, message: str) -> None:
    Path("wrong.yaml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    model = () if "model" in str(content) else MODULE
    assert usage_error(command, *model, "-c", "wrong.yaml").startswith(message)


@pytest.mark.parametrize(
    ("percentile", "message"),
    [
        ("x", "wrong.yaml: trainer.callbacks.policy.percentile x: expected float."),
        (1000, "PercentileClipping: percentile=1000.0 must be in [0, 100]."),
    ],
)
def test_policy_in_list_in_file(mine: Path, command: Command, percentile: object, message: str) -> None:
    policy = {"class_path": "PercentileClipping", "init_args": {"percentile": percentile}}
    entry = {"class_path": "AdaptiveGradientClipping", "init_args": {"policy": policy}}
    Path("wrong.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [entry]}}))
    assert usage_error(command, *MODULE, "-c", "wrong.yaml") == message


def test_missing_module_and_data(mine: Path, command: Command) -> None:
    assert usage_error(command, "--data=mine.Data") == (
        "add --model my.Module: neither the command nor a file of --config names a module."
    )
    assert usage_error(command, *MODULE[:2], "--seed_everything=0") == (
        "name the data with --data my.Data: Net has no train_dataloader of its own."
    )
    assert "No `training_step()` method defined" in usage_error(
        command, "--model=mine.Untrainable", "--seed_everything=0", "--trainer.max_epochs=1"
    )


def test_binary_file(mine: Path, command: Command) -> None:
    Path("wrong.yaml").write_bytes(b"\xff\xfe\x00")
    assert usage_error(command, "-c", "wrong.yaml").startswith("--config wrong.yaml cannot be read: ")
    Path("wrong.yaml").write_bytes(b"a: \x00")
    assert usage_error(command, "-c", "wrong.yaml").startswith("--config wrong.yaml cannot be read: ")


def test_wording_of_both_jsonargparse_versions() -> None:
    """The wording and the order of alternatives differ between the supported versions."""
    value = """Parser key "nan_rollback":
  Does not validate against any of the Union subtypes
  Errors:
    - Expected a <class 'NoneType'>
    - Problem with given class_path 'lightning_gradguard.NaNRollback':
        Parser key "check":
          {}
  Given value: NestedArg(key='check', val='exat')"""
    arguments = ["--nan_rollback.check", "exat"]
    for line in (
        "Cannot take a Union of no types.",
        "Expected a typing.Literal['exact', 'deferred']. Got value: exat",
    ):
        assert parse_error_message(value.format(line), arguments, [], []) == (
            "--nan_rollback.check exat: expected one of 'exact', 'deferred'. Did you mean exact?"
        )
    for line in ("Option 'patienc' is not accepted", "Validation failed: Key 'patienc' is not expected"):
        message = parse_error_message(
            value.replace('Parser key "check":', "").format(line), arguments, [], []
        )
        assert message.endswith("takes no such argument. Did you mean --nan_rollback.patience?")
    policy = """Parser key "adaptive_gradient_clipping":
    - Problem with given class_path 'lightning_gradguard.AdaptiveGradientClipping':
        Parser key "policy":
          Subtypes: [<class 'lightning_gradguard.core.clipping.ClippingPolicy'>, <class 'NoneType'>]
          Errors:
            - {}
          Given value: {}"""
    key = "adaptive_gradient_clipping.policy"
    abstract = "Expected an instantiatable class, but lightning_gradguard.ClippingPolicy is abstract"
    no_class = "Not a valid subclass of ClippingPolicy"
    for line in (abstract, no_class):
        assert parse_error_message(
            policy.format(line, "NestedArg(key='percentile', val='20')"), [], [], []
        ) == (f"--{key}.percentile: name the class first, as --{key} PercentileClipping.")
    Path("policy.yaml").write_text("adaptive_gradient_clipping: {policy: {max_norm: 2}}")
    for line in (abstract, no_class):
        error = policy.format(line, "{'max_norm': 2}")
        assert parse_error_message(error, [], ["policy.yaml"], []) == (
            f"policy.yaml: {key}: name the class, as `class_path: GlobalNormClipping`."
        )
    assert "this takes the path of a class" in parse_error_message(policy.format(no_class, "20"), [], [], [])
    missing = """Parser key "model":
    - Problem with given class_path 'mine.NeedsWidth':
        {}"""
    for line in (
        "the following arguments are required: width, depth",
        'Key "width" is required but not incl',
    ):
        message = parse_error_message(missing.format(line), [], [], [])
        assert message.startswith("mine.NeedsWidth needs --model.width")
    for line in (
        "Unrecognized arguments: --trainer.max_step 5",
        "unrecognized arguments: --trainer.max_step 5",
    ):
        assert "Did you mean --trainer.max_steps?" in parse_error_message(line, [], [], ["trainer.max_steps"])
    assert parse_error_message("something else\n  altogether", [], [], []) == "something else altogether"


@dataclasses.dataclass
class Size:
    width: int = 8
    mode: Literal["wide", "deep"] = "wide"


class Part:
    def __init__(self, n: int, size: Optional[Size] = None) -> None:  # noqa: UP045
        pass


class Nested(pl.LightningModule):
    def __init__(
        self,
        part: Part,
        parts: Sequence[Part] = (),
        size: Optional[Size] = None,  # noqa: UP045
        rate: Union[float, Literal["auto"]] = 0.1,  # noqa: UP007
    ) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "HERE.Nested needs --model.part."),
        ("--model.part HERE.Part", "HERE.Part needs --model.part.n."),
        (
            "--model.part HERE.Partt",
            "--model.part HERE.Partt: HERE.Partt does not exist. Did you mean HERE.Part?",
        ),
        ("--model.part HERE.Part --model.part.n x", "--model.part.n x: expected int."),
        (
            "--model.part HERE.Part --model.part.m 1",
            "--model.part.m: HERE.Part takes no such argument. There are: n, size.",
        ),
        (
            "--model.parts+=HERE.Partt",
            "--model.parts HERE.Partt: HERE.Partt does not exist. Did you mean HERE.Part?",
        ),
        (
            "--model.size.widht 3",
            "--model.size.widht: HERE.Size takes no such argument. Did you mean --model.size.width?",
        ),
        (
            "--model.size.mode wied",
            "--model.size.mode wied: expected one of 'wide', 'deep'. Did you mean wide?",
        ),
        ("--model.rate x", "--model.rate x: expected float or one of 'auto'."),
    ],
)
def test_nested_and_optional_arguments(arguments: str, message: str) -> None:
    argv = f"dossier --model HERE.Nested {arguments}".replace("HERE", __name__).split()
    with pytest.raises(ArgumentError) as raised:
        argument_parser().parse_args(argv)
    assert parse_error_message(str(raised.value), argv, [], []) == message.replace("HERE", __name__)
