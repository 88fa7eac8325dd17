"""The demo in TensorBoard in a real browser; the pictures are those of the documentation.

`make browser-test` runs it; `--pictures docs/images` keeps what it saw.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from lightning_gradguard.cli.demo import main
from tests.tensorboard_server import Server, tensorboard

#: A headless browser without access to other hosts.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTH, HEIGHT = 1280, 1000
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """TensorBoard on both runs of the demo."""
    logdir = tmp_path_factory.mktemp("demo") / "runs"
    main(["--max_steps", "100", "--logdir", str(logdir)])
    with tensorboard(logdir) as server:
        yield server


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """One tab."""
    executable = os.environ.get("CHROMIUM") or shutil.which("chromium")
    assert executable, "there is no chromium; name one by CHROMIUM=/path/to/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=1)
        yield page
        browser.close()


class Pictures:
    """Writes pictures to a folder.

    Args:
        folder: Where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def take(self, page: Page, name: str, height: int = HEIGHT) -> None:
        """Save what the page shows down to a height in pixels, and see that it is not blank."""
        path = self.folder / f"{name}.png"
        page.screenshot(path=path, clip={"x": 0, "y": 0, "width": WIDTH, "height": height})
        assert path.stat().st_size > 20_000


@pytest.fixture
def pictures(request: pytest.FixtureRequest) -> Pictures:
    """Returns the folder of `--pictures`, or one of the test."""
    folder = request.config.getoption("--pictures")
    return Pictures(request.config.invocation_params.dir / folder if folder else Path.cwd())


def visit(page: Page, server: Server, tab: str, query: str = "") -> None:
    """Open a tab; a new hash alone would not load it anew."""
    page.goto("about:blank")
    page.goto(f"{server.url}{query}#{tab}")


def test_every_tab_that_has_something_is_offered(page: Page, server: Server) -> None:
    visit(page, server, "timeseries")
    page.wait_for_selector("card-view")
    tabs = {tab.inner_text().strip().upper() for tab in page.get_by_role("tab").all() if tab.is_visible()}
    assert tabs >= {"TIME SERIES", "CUSTOM SCALARS", "IMAGES", "TEXT"}


def test_time_series(page: Page, server: Server, pictures: Pictures) -> None:
    visit(
        page,
        server,
        "timeseries",
        "?smoothing=0&tagFilter=log10/grad_norm(_clipped)%3F/total|grad_norm/rnn.weight_hh",
    )
    page.wait_for_selector("card-view line-chart")
    page.get_by_text("log10/grad_norm_clipped/total").first.wait_for()
    page.get_by_text("grad_norm/rnn.weight_hh_l0").first.wait_for()
    page.get_by_text("Ignore outliers in chart scaling").click()
    page.get_by_text("3 cards").first.wait_for()
    page.wait_for_timeout(2000)
    assert page.get_by_text("No data").count() == 0
    pictures.take(page, "time_series")


def test_custom_scalars(page: Page, server: Server, pictures: Pictures) -> None:
    visit(page, server, "custom_scalars&_smoothingWeight=0")
    page.wait_for_selector("tf-custom-scalar-margin-chart-card")
    page.get_by_text("Ignore outliers in chart scaling").click()
    page.get_by_text("Matches (4)").first.wait_for()  # the guarded run has three of them, the bare one one
    layout = server.layout()
    for title in (title for charts in layout.values() for title in charts):
        assert page.get_by_text(title, exact=True).count() == 1
    lines = sum("multiline" in chart for charts in layout.values() for chart in charts.values())
    assert page.locator("tf-custom-scalar-multi-line-chart-card").count() == lines >= 7
    assert page.locator("tf-custom-scalar-margin-chart-card").count() == 1
    page.wait_for_timeout(2000)
    assert page.get_by_text("Matches (0)").count() == 0
    assert page.get_by_text("do not match").count() == 0
    pictures.take(page, "custom_scalars")


def test_images(page: Page, server: Server, pictures: Pictures) -> None:
    visit(page, server, "images")
    page.wait_for_selector("tf-image-loader img")
    page.wait_for_function(
        "n => { const seen = []; const walk = root => root.querySelectorAll('*').forEach(node => {"
        " if (node.tagName == 'IMG' && node.naturalWidth > 300) seen.push(node);"
        " if (node.shadowRoot) walk(node.shadowRoot); }); walk(document); return seen.length == n; }",
        arg=2,
    )
    assert page.get_by_text("grad_norm/layers", exact=True).count() >= 2
    pictures.take(page, "images", height=540)


def test_text(page: Page, server: Server, pictures: Pictures) -> None:
    visit(page, server, "text")
    page.wait_for_selector("tf-text-loader table")
    text = " ".join(table.inner_text() for table in page.locator("tf-text-loader table").all())
    pictures.take(page, "text")
    assert "Nonfinite gradients" in text
    assert "Rollback" in text
    assert "embedding.weight and 4 more" in text
