"""The page is self-contained and escapes its input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_gradguard import default_callbacks
from lightning_gradguard.report.render.html import to_html
from tests.report.pages import Page, charts
from tests.report.runs import printed, report_of, train, write_events
from tests.tasks import Classifier, clusters, poisoned


def test_page_is_self_contained(capsys: pytest.CaptureFixture[str]) -> None:
    path = train(Classifier(), poisoned(clusters(60), nan=[30, 31]), default_callbacks())
    Path("pages").mkdir()
    printed(capsys, "run", "--html", "pages/page.html")
    text = Path("pages/page.html").read_text()
    page = Page(text)
    assert page.links == ["../run/incidents/30/index.html"]
    assert Path("pages", page.links[0]).is_file()
    assert not page.fetched
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    loss, norms, layers = (set(chart.itertext()) for chart in charts(text))
    assert "incident" in loss
    assert {"before clipping", "after clipping", "threshold"} <= norms
    assert {"net.0.weight", "net.6.bias"} <= layers
    assert report_of(path).run.dossiers[0].path in text
    assert "prefers-color-scheme:dark" in text


def test_markup_in_names_is_escaped() -> None:
    tags = {"grad_norm/<script>alert(1)</script>.weight": [1.0, 2.0], "grad_norm/total": [1.0, 2.0]}
    path = write_events("run", tags)
    incidents = {"kind": "<b>odd</b>", "step": 1, "where": ["<i>x</i>"], "detail": "a & b"}
    (path / "incidents.jsonl").write_text(json.dumps(incidents))
    (path / "hparams.yaml").write_text("title: <u>x</u>\n")
    page = to_html([report_of(path, "<em>run</em>")])
    assert not {"script", "b", "u", "em"} & set(Page(page).tags)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert len(charts(page)) == 2
