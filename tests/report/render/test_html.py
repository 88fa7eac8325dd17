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


def test_runs_are_linked_and_coloured() -> None:
    healthy = write_events("runs/bare/version_0", {"train_loss": [2.0 * 0.9**i for i in range(30)]})
    failed = write_events("runs/guarded/version_0", {"train_loss": [4.0, 3.0, 1e9, float("nan")]})
    page = to_html([report_of(healthy, "bare"), report_of(failed, "guarded")])
    assert '<a href="#run-1">guarded</a>' in page
    assert '<h2 id="run-1">guarded: ' in page
    assert '<td class="good">healthy</td>' in page
    assert '<td class="bad">divergence</td>' in page
    assert '<th class="bad">divergence</th>' in page
