"""A dossier holds what a replay needs, can be read without running code, and never costs the run."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import resource
from collections.abc import Callable
from enum import Enum
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves_with_path

from lightning_gradguard import NaNRollback
from lightning_gradguard.core.forensics import Origin
from lightning_gradguard.core.remedies import advice_for_cause
from lightning_gradguard.core.snapshots import rng_state, set_rng_state
from lightning_gradguard.runtime.incidents.dossier import (
    Dossier,
    DossierError,
    read_dossier,
    write_dossier,
)
from lightning_gradguard.runtime.logging import console
from tests.tasks import Batch, Classifier, batches, fit, poisoned, weights


def dossier(**facts: Any) -> Dossier:
    weights = dict(Classifier().state_dict())
    given: dict[str, Any] = {
        "origin": Origin("bad_input", where=("batch[0]",), detail="batch[0] holds nonfinite values."),
        "step": 6,
        "epoch": 1,
        "batch_idx": 2,
        "rank": 0,
        "batch": batches(1)[0],
        "rng": rng_state(),
        "weights": weights,
    }
    return Dossier(**{**given, **facts})


def train(folder: Path, nan: int = 6, module: Classifier | None = None, **arguments: Any) -> Classifier:
    """A fit in which one batch is lost."""
    module = module or Classifier(norm=True)
    fit(module, poisoned(batches(12), nan=[nan]), [NaNRollback(**arguments)], folder)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))
    return module


def incident(folder: Path) -> dict[str, Any]:
    (line,) = (folder / "incidents.jsonl").read_text().splitlines()
    found: dict[str, Any] = json.loads(line)
    return found


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(text, parse_constant=refuse)


class Page(HTMLParser):
    """Its words, and the tags that it is made of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_lost_batch_leaves_a_dossier(tmp_path: Path) -> None:
    train(tmp_path)
    folder = tmp_path / "incidents" / "6"
    assert incident(tmp_path)["dossier"] == str(folder.relative_to(tmp_path))
    assert sorted(path.name for path in folder.iterdir()) == ["dossier.pt", "finding.json", "index.html"]
    assert [path.name for path in folder.parent.iterdir()] == ["6"]
    finding = strict_json((folder / "finding.json").read_text())
    assert (finding["cause"], finding["where"], finding["step"]) == ("bad_input", ["batch[0]"], 6)
    assert finding["versions"]["torch"] == torch.__version__
    page = Page((folder / "index.html").read_text())
    assert "bad input" in page.words
    assert advice_for_cause("bad_input", ["batch[0]"]) in page.words
    assert any("--model tests.tasks.Classifier" in words for words in page.words)
    assert any("640 nonfinite" in words for words in page.words)


def test_it_is_read_without_running_code_and_is_what_the_step_found(tmp_path: Path) -> None:
    data = poisoned(batches(12), nan=[6])
    before = Classifier(norm=True)
    fit(before, data[:6], folder=tmp_path / "before")
    train(tmp_path)
    path = tmp_path / "incidents" / "6"
    content = torch.load(path / "dossier.pt", weights_only=True)
    assert content["format"] == 1
    found = read_dossier(path)
    assert (found.step, found.epoch, found.batch_idx, found.rank) == (6, 0, 6, 0)
    assert found.weights is not None
    assert found.weights.keys() == before.state_dict().keys()
    assert all(torch.equal(found.weights[name], value) for name, value in before.state_dict().items())
    assert torch.equal(found.batch[0].isnan(), data[6][0].isnan())
    assert torch.equal(found.batch[1], data[6][1])
    assert (found.precision, found.loss_scale, found.left_out) == ("32-true", 1.0, ())
    assert found.configuration["module"] == "tests.tasks.Classifier"
    assert "0.05" in found.configuration["optimizer 0"]


def test_random_numbers_go_on_as_they_did(tmp_path: Path) -> None:
    path = write_dossier(tmp_path, dossier(), megabytes=1)
    drawn = (torch.rand(3), np.random.rand(3))
    set_rng_state(read_dossier(path).rng)
    assert torch.equal(drawn[0], torch.rand(3))
    np.testing.assert_array_equal(drawn[1], np.random.rand(3))


def test_modes_and_frozen_weights_are_written_down(tmp_path: Path) -> None:
    class Partly(Classifier):
        def on_train_start(self) -> None:
            first: Any = self.net[0]
            first.weight.requires_grad_(False)
            self.net[1].eval()

    train(tmp_path, module=Partly(norm=True))
    found = read_dossier(tmp_path / "incidents" / "6")
    assert (found.evaluating, found.frozen) == (("net.1",), ("net.0.weight",))


class Color(str, Enum):
    RED = "red"


class Named(tuple[Any, ...]):
    """A class that reading would have to import."""


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ((torch.ones(2), torch.arange(3)), (torch.ones(2), torch.arange(3))),
        ({"x": torch.ones(2), "id": ["a", "b"], 3: None}, {"x": torch.ones(2), "id": ["a", "b"], 3: None}),
        ([[torch.ones(1)], ("s", b"bytes", True, 2, 0.5)], [[torch.ones(1)], ("s", b"bytes", True, 2, 0.5)]),
        (Named([torch.ones(1), np.float64(0.5), np.int8(3), Color.RED]), (torch.ones(1), 0.5, 3, "red")),
        (nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.ones(8)[::2].expand(3, 4), torch.ones(3, 4)),
        (torch.tensor([1, 2], dtype=torch.uint16), torch.tensor([1, 2], dtype=torch.uint16)),
        (torch.tensor([1 + 2j]), torch.tensor([1 + 2j])),
    ],
)
def test_batches_of_every_kind(tmp_path: Path, batch: Any, expected: Any) -> None:
    found = read_dossier(write_dossier(tmp_path, dossier(batch=batch), megabytes=1))
    assert found.left_out == ()
    for (path, one), (other_path, other) in zip(
        tree_leaves_with_path(found.batch), tree_leaves_with_path(expected), strict=True
    ):
        assert path == other_path
        assert type(one) is type(other)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert type(found.batch) is type(expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint32", "float16", "float64", ">f4", "bool"])
def test_arrays_come_back_as_arrays(tmp_path: Path, dtype: str) -> None:
    array = np.array([[0, 1], [1, 1]], dtype=dtype)[::-1]
    path = write_dossier(tmp_path, dossier(batch={"x": array}), megabytes=1)
    found = read_dossier(path).batch["x"]
    assert found.dtype == array.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, array)
    words = Page((path / "index.html").read_text()).words
    assert any(text.startswith("batch['x']") for text in words)


@pytest.mark.parametrize(
    ("batch", "culprit"),
    [
        ((torch.ones(1), lambda: None), "function"),
        ({"graph": object()}, "object"),
        (np.array(["a", "b"]), "str_"),
        ([np.longdouble(1)], "longdouble"),
        (torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), "NestedTensor"),
    ],
)
def test_what_is_no_plain_data_is_left_out(tmp_path: Path, batch: Any, culprit: str) -> None:
    path = write_dossier(tmp_path, dossier(batch=batch), megabytes=1)
    found = read_dossier(path)
    assert found.batch is None
    assert found.weights is not None
    (left_out,) = found.left_out
    assert left_out.startswith("the batch: ")
    assert culprit in left_out
    assert strict_json((path / "finding.json").read_text())["left_out"] == [left_out]
    assert left_out in Page((path / "index.html").read_text()).words


def test_a_batch_that_is_no_plain_data_costs_no_training(tmp_path: Path) -> None:
    class Sample:
        def __init__(self, batch: Batch) -> None:
            self.batch = batch

        def __reduce__(self) -> Any:
            raise pickle.PicklingError("not this one")

    class Takes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return nn.functional.cross_entropy(self.net(batch.batch[0]), batch.batch[1])

    module: Any = Takes()
    data: Any = [Sample(batch) for batch in poisoned(batches(12), nan=[6])]
    fit(module, data, [NaNRollback()], tmp_path)
    found = read_dossier(tmp_path / "incidents" / "6")
    assert found.batch is None
    assert found.left_out == ("the batch: Sample is not plain data",)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_extra_state_costs_no_training(tmp_path: Path) -> None:
    class Counts(nn.Identity):
        def get_extra_state(self) -> Any:
            return {"calls": object()}

        def set_extra_state(self, state: Any) -> None:
            raise AssertionError("there is none")

    module = Classifier()
    module.net[1] = Counts()
    train(tmp_path, module=module)
    found = read_dossier(tmp_path / "incidents" / "6")
    assert found.left_out == ("net.1._extra_state among the weights: dict is not plain data",)
    assert found.weights is not None
    assert "net.0.weight" in found.weights


def test_limit_omits_weights_first(tmp_path: Path) -> None:
    def sizes(name: str, megabytes: float) -> Dossier:
        return read_dossier(write_dossier(tmp_path / name, dossier(), megabytes=megabytes))

    # the batch takes 2.8 kB, the weights 24 kB
    everything = sizes("all", 0.05)
    assert everything.left_out == ()
    batch_only = sizes("batch", 0.02)
    assert batch_only.weights is None
    assert batch_only.batch is not None
    (left_out,) = batch_only.left_out
    assert left_out.startswith("the weights: 0.02")
    assert "0.02 MB" in left_out
    nothing = sizes("nothing", 0)
    assert (nothing.batch, nothing.weights) == (None, None)
    assert [text.split(":")[0] for text in nothing.left_out] == ["the batch", "the weights"]
    assert (tmp_path / "nothing" / "6" / "index.html").exists()


def test_the_limit_of_the_callback_is_that_of_the_dossier(tmp_path: Path) -> None:
    train(tmp_path, max_dossier_megabytes=0.02)
    assert read_dossier(tmp_path / "incidents" / "6").weights is None


def test_no_more_dossiers_than_allowed(tmp_path: Path) -> None:
    module = Classifier()
    data = poisoned(batches(40), nan=[5, 6, 15, 25, 35])
    fit(module, data, [NaNRollback(max_dossiers=2)], tmp_path)
    assert sorted(path.name for path in (tmp_path / "incidents").iterdir()) == ["15", "5"]
    none = tmp_path / "none"
    train(none, max_dossiers=0)
    assert not (none / "incidents").exists()
    assert incident(none)["dossier"] == ""


def test_two_dossiers_of_one_step_stand_side_by_side(tmp_path: Path) -> None:
    assert write_dossier(tmp_path, dossier(), megabytes=1).name == "6"
    assert write_dossier(tmp_path, dossier(), megabytes=1).name == "6-2"


def test_page_prints_the_command_for_the_folder_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(folder: Path) -> str:
        written = write_dossier(folder, dossier(configuration={"module": "my.Net"}), megabytes=1)
        words = Page((written / "index.html").read_text()).words
        (found,) = [text for text in words if text.startswith("lightning-gradguard replay")]
        return found

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    ending = "--model my.Net"
    assert command(tmp_path / "here" / "run") == f"lightning-gradguard replay run/6 {ending}"
    assert command(Path("run")) == f"lightning-gradguard replay run/6-2 {ending}"
    assert command(tmp_path / "a b") == f"lightning-gradguard replay '{tmp_path}/a b/6' {ending}"


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    origin = Origin("forward_pass", "forward", evil, evil, (evil,), "float32", 0.0, 1.0, evil)
    odd = dossier(
        origin=origin, batch={evil: torch.ones(1), "t": evil}, configuration={evil: evil, "module": evil}
    )
    page = Page((write_dossier(tmp_path, odd, megabytes=1) / "index.html").read_text())
    assert "script" not in page.tags
    assert page.words.count(evil) > 4


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_only(*_: Any, **__: Any) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize(
    ("where", "name", "failure"),
    [(torch, "save", no_space), (os, "rename", no_space), (Path, "mkdir", read_only)],
)
def test_a_full_or_read_only_disk_costs_no_training(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: Any,
    name: str,
    failure: Callable[..., None],
) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "print_message", lambda trainer, message, *level: said.append(message))
    (tmp_path / "incidents").mkdir()
    (tmp_path / "incidents.jsonl").touch()
    if where is Path:
        # only below `incidents`: what else is written has tests of its own
        make = Path.mkdir
        monkeypatch.setattr(
            Path,
            "mkdir",
            lambda path, *a, **k: failure() if "incidents" in path.parts else make(path, *a, **k),
        )
    else:
        monkeypatch.setattr(where, name, failure)
    train(tmp_path)
    assert [text for text in said if "no dossier was written: [Errno" in text]
    assert list((tmp_path / "incidents").iterdir()) == []
    assert incident(tmp_path)["dossier"] == ""
    assert incident(tmp_path)["cause"] == "bad_input"


def test_a_disk_that_is_really_full_is_an_os_error(tmp_path: Path) -> None:
    """Torch raises another kind of error then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match="too large"):
            write_dossier(tmp_path, dossier(), megabytes=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_costs_no_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(console, "print_message", lambda trainer, message, *level: said.append(message))
    (tmp_path / "incidents").write_text("in the way")
    train(tmp_path)
    assert any("no dossier was written" in text and "exists" in text for text in said)
    assert incident(tmp_path)["dossier"] == ""


@pytest.mark.parametrize(
    ("cause", "spoil", "largest"),
    [
        ("corrupted_weights", slice(0, 1), ["net.0.weight"]),
        ("update_too_large", slice(None), ["net.0.weight"]),
    ],
)
def test_weights_of_the_healthy_run(tmp_path: Path, cause: str, spoil: slice, largest: list[str]) -> None:
    class Breaks(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            first: Any = self.net[0]
            if batch_idx == 6:
                self.good = float(first.weight.detach().abs().max())
                first.weight.data[0, spoil] = math.inf

    module = Breaks()
    fit(module, batches(12), [NaNRollback(snapshot_every_n_steps=1)], tmp_path)
    found = read_dossier(tmp_path / "incidents" / "6")
    assert found.origin.cause == cause
    assert list(found.largest) == largest
    assert found.largest["net.0.weight"] == pytest.approx(module.good, rel=0.1)


class _Touches:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_malicious_file_runs_no_code(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    path = tmp_path / "dossier.pt"
    for write in (lambda content: torch.save(content, path), lambda c: path.write_bytes(pickle.dumps(c))):
        write({"format": 1, "batch": _Touches(touched)})
        with pytest.raises(DossierError, match=r"more than plain data; it was not loaded"):
            read_dossier(path)
        assert not touched.exists()


def test_files_that_are_no_dossiers_are_rejected_with_a_reason(tmp_path: Path) -> None:
    good = write_dossier(tmp_path, dossier(), megabytes=1) / "dossier.pt"
    whole, content = good.read_bytes(), torch.load(good, weights_only=True)
    path = tmp_path / "dossier.pt"
    with pytest.raises(DossierError, match="there is no dossier in"):
        read_dossier(path)
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DossierError, match="damaged or no dossier|is not a dossier"):
            read_dossier(path)
    for other in (
        {**content, "format": 2},
        {k: v for k, v in content.items() if k != "format"},
        [content],
        torch.ones(1),
    ):
        torch.save(other, path)
        with pytest.raises(DossierError, match="has format .*reads format 1. Install the version"):
            read_dossier(path)
    for other in (
        {k: v for k, v in content.items() if k != "rng"},
        {**content, "origin": "unknown"},
        {**content, "rng": {"numpy": {"lightning_gradguard.numpy": 1}}},
        {**content, "more": 1},
    ):
        torch.save(other, path)
        with pytest.raises(DossierError, match="lacks what a dossier holds"):
            read_dossier(path)
