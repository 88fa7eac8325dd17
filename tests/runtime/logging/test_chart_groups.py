"""Parameters are grouped so that no network makes more charts than `FEW`."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.runtime.logging.chart_groups import MAX_CHARTS, MAX_ROWS, chart_names

PATHS = st.lists(st.sampled_from(["body", "head", "0", "1", "2", "mlp"]), min_size=1, max_size=4)


def transformer(blocks: int) -> list[str]:
    parts = ("attention.query", "attention.key", "attention.value", "mlp.0", "mlp.2", "norm")
    return [
        f"blocks.{i}.{part}.{kind}" for i in range(blocks) for part in parts for kind in ("weight", "bias")
    ]


def test_few_parameters_have_one_chart_each() -> None:
    names = transformer(1)
    assert len(names) == MAX_CHARTS // 2
    assert chart_names(names, "auto") == names


def test_more_parameters_are_grouped_by_module() -> None:
    names = transformer(2)
    assert chart_names(names, "auto")[:3] == ["blocks.0.attention.query"] * 2 + ["blocks.0.attention.key"]
    assert chart_names(names, "auto") == chart_names(names, "module")
    assert chart_names(names, "auto", MAX_ROWS) == names, "the heat map has more rows"


def test_more_modules_are_grouped_by_block() -> None:
    charts = chart_names(transformer(16), "auto")
    assert len(charts) == 192
    assert set(charts) == {f"blocks.{i}" for i in range(16)}
    assert len(set(chart_names(transformer(16), "module"))) == 96
    assert len(set(chart_names(transformer(16), "parameter"))) == 192


def test_blocks_of_a_deep_network_keep_separate_charts() -> None:
    names = [f"model.layers.{i}.{part}.weight" for i in range(60) for part in ("attention", "mlp")]
    charts = chart_names(["model.embed.weight", *names, "head.weight"], "auto")
    assert len(set(charts)) <= MAX_CHARTS + 2, "those at the ends have no neighbours"
    assert charts[:3] == ["model.embed", *["model.layers.0-2"] * 2]
    assert charts[-3:] == ["model.layers.57-59"] * 2 + ["head"]


def test_flat_network_has_few_charts() -> None:
    charts = chart_names([f"net.{i}.{kind}" for i in range(150) for kind in ("weight", "bias")], "auto")
    assert charts[:15] == ["net.0-6"] * 14 + ["net.7-13"]
    assert len(set(charts)) == 22


def test_level_total_has_no_charts() -> None:
    assert chart_names(["weight"], "total") == []


@given(st.lists(PATHS.map(".".join), unique=True, max_size=200))
def test_parameter_is_in_the_chart_of_its_module(names: list[str]) -> None:
    charts = chart_names(names, "auto")
    assert len(charts) == len(names)
    for name, chart in zip(names, charts, strict=True):
        first, _, last = chart.partition("-")
        assert name == chart or name.startswith(f"{first}.") or last, (name, chart)
    together: dict[str, list[int]] = {}
    for i, chart in enumerate(charts):
        together.setdefault(chart, []).append(i)
    if len(names) > MAX_CHARTS:
        assert len(together) < len(names)
