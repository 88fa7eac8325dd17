"""Classes are found by their paths, and take arguments of any name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lightning_gradguard.cli.messages import failure_message, instantiate, recording_failures
from tests.cli.conftest import QUIET, Command, saved

pytestmark = pytest.mark.filterwarnings("ignore:\\s*skip_none parameter was deprecated")

#: Names that the code which instantiates classes might use itself.
NAMES = ("kind", "build", "instantiate", "instantiator", "failures", "cls", "args", "kwargs", "trainer")
ARGUMENTS = {name: i for i, name in enumerate(NAMES, 2)}
PARAMETERS = ", ".join(f"{name}: int = 1" for name in NAMES)
CLASSES = f"""
from mine import Data, Own

class Part:
    def __init__(self, {PARAMETERS}):
        assert {" + ".join(NAMES)} == {sum(ARGUMENTS.values())}

class Odd(Own):
    def __init__(self, part: Part, {PARAMETERS}):
        super().__init__(width=kind)
        assert {" + ".join(NAMES)} == {sum(ARGUMENTS.values())}

class OddData(Data):
    def __init__(self, {PARAMETERS}):
        super().__init__()
        assert {" + ".join(NAMES)} == {sum(ARGUMENTS.values())}
"""


@pytest.mark.parametrize("verb", ["fit", "check"])
def test_arguments_have_any_name(mine: Path, command: Command, verb: str) -> None:
    Path("odd.py").write_text(CLASSES)
    part = {"class_path": "odd.Part", "init_args": ARGUMENTS}
    config = {
        "model": {"class_path": "odd.Odd", "init_args": {"part": part, **ARGUMENTS}},
        "data": {"class_path": "odd.OddData", "init_args": ARGUMENTS},
    }
    Path("odd.yaml").write_text(yaml.safe_dump(config))
    code, _, err = command(verb, "-c", "odd.yaml", *QUIET)
    assert (code, "could not be built" in err) == (0, False), err
    if verb == "fit":
        assert saved()["model"]["init_args"]["kind"] == ARGUMENTS["kind"]


@pytest.mark.parametrize("name", ["class_type", "help", "_width"])
def test_a_name_that_jsonargparse_uses_itself_is_named(mine: Path, command: Command, name: str) -> None:
    Path(f"taken{name}.py").write_text(
        f"from mine import Own\nclass Taken(Own):\n    def __init__(self, {name}: int = 1):\n"
        "        super().__init__()\n"
    )
    given = [f"--model.{name}=2"] if name == "_width" else []
    code, _, err = command("check", "--model", f"taken{name}.Taken", *given, "--data", "mine.Data")
    assert code == 2
    assert f"an argument of __init__ is named {name}" in err
    assert "rename it" in err


def test_instantiators_have_no_names_of_their_own() -> None:
    def build(kind: type, /, **kwargs: object) -> dict[str, object]:
        return kwargs

    names = {"kind": 1, "instantiator": 2, "failures": 3, "args": 4, "kwargs": 5}
    assert instantiate(dict, **names) == names
    assert recording_failures(build, [])(dict, **names) == names


def test_failures_are_recorded() -> None:
    failures: list[tuple[type, Exception, list[str]]] = []

    class Fails:
        def __init__(self, width, depth=None) -> None:  # type: ignore[no-untyped-def]
            raise KeyError("label")

    with pytest.raises(KeyError) as raised:
        recording_failures(instantiate, failures)(Fails, width=None, depth=None)
    assert failures == [(Fails, raised.value, ["width"])]
    message = failure_message(failures, RuntimeError("of jsonargparse"))
    assert message.startswith(f"{__name__}.")
    assert "Fails could not be built: KeyError: 'label' (" in message
    assert message.endswith("; it needs width, which no option gives.")
