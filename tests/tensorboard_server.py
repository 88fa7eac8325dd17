"""TensorBoard on a folder, with its answers over HTTP."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Server:
    """TensorBoard as a browser sees it.

    Args:
        url: Address with a slash at the end.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **query: str) -> Any:
        """Returns the response, parsed if it is JSON."""
        address = f"{self.url}{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            content = answer.read()
            is_json = answer.headers.get_content_type() == "application/json"
        return json.loads(content) if is_json else content

    def scalar_tags(self, run: str) -> set[str]:
        """Tags of scalars of a run."""
        return set(self.get("data/plugin/scalars/tags")[run])

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        """Steps and values."""
        return [(step, float(v)) for _, step, v in self.get("data/plugin/scalars/scalars", run=run, tag=tag)]

    def layout(self) -> dict[str, dict[str, Any]]:
        """Charts of the Custom Scalars tab: category to title to chart."""
        found = self.get("experiment/defaultExperimentId/data/plugin/custom_scalars/layout")
        return {
            category["title"]: {chart["title"]: chart for chart in category["chart"]}
            for category in found["category"]
        }


@contextmanager
def tensorboard(logdir: Path) -> Iterator[Server]:
    """Serve a folder on a free port of this machine, until the block ends."""
    process = subprocess.Popen(
        [
            sys.executable, "-m", "tensorboard.main", "--logdir", logdir.name, "--host", "127.0.0.1",
            "--port", "0", "--samples_per_plugin", "images=100", "--reload_interval", "0",
        ],
        cwd=logdir.parent,  # a page shows the path as it was given
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        output = ""
        for line in process.stderr:
            output += line
            if address := re.search(r"http://\S+", line):
                break
        else:
            raise AssertionError(f"TensorBoard did not start: {output}")
        server = Server(address[0])
        _wait_for_runs(server)
        yield server
    finally:
        process.terminate()
        process.communicate()


def _wait_for_runs(server: Server) -> None:
    """It answers before it has read the folder."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if server.get("data/runs"):
            return
        time.sleep(0.1)
    raise AssertionError("TensorBoard found no run.")
