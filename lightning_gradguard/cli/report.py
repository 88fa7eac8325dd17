"""`lightning-gradguard report`: reports on runs from their logs: what went wrong, where, and the remedy."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_gradguard.cli.messages import UsageError, usage_errors_reported
from lightning_gradguard.core.arguments import nearest
from lightning_gradguard.report.readers.runs import find_runs, read_run
from lightning_gradguard.report.render.html import to_html
from lightning_gradguard.report.render.json import to_json
from lightning_gradguard.report.render.text import to_text
from lightning_gradguard.report.run_report import report_on

_DESCRIPTION = """\
Reads the logs of training runs (TensorBoard event files or the metrics.csv of CSVLogger, incidents.jsonl) and
reports what went wrong, where, and the remedy. Any folder with gradient norms will do: those of this package,
Lightning's grad_norm, Hugging Face's Trainer, NeMo, Composer and others."""
_EPILOG = """\
examples:
  lightning-gradguard report lightning_logs/version_0
  lightning-gradguard report lightning_logs --html
  lightning-gradguard report runs/bare runs/guarded --json | jq '.runs[].headline'

Exit code 0: a report was printed, whatever its verdict; 2: wrong input."""


_OPTIONS = ("--html", "--json", "--help")


def main(arguments: Sequence[str]) -> None:
    """Reports on runs, in the terminal or in files."""
    with usage_errors_reported("report"):
        options, unknown = _parsed(arguments)
        if unknown:
            raise UsageError(f"there is no {unknown}.{nearest(unknown, _OPTIONS)}")
    folders: list[Path] = options.run_dirs
    json_file: Path | None = options.json
    html_file: Path | None = options.html
    # `--json RUN_DIR`: no report can be written to a folder
    if json_file is not None and json_file.is_dir():
        folders, json_file = [*folders, json_file], Path("-")
    if html_file is not None and html_file.is_dir():
        folders, html_file = [*folders, html_file], Path("report.html")
    with usage_errors_reported("report"):
        if not folders:
            raise UsageError(
                "name the folder of a run, as in: lightning-gradguard report lightning_logs/version_0"
            )
        try:
            runs = find_runs(folders)
        except FileNotFoundError as error:
            raise UsageError(str(error)) from None
        reports = [report_on(read_run(name, path)) for name, path in runs.items()]
        if html_file is not None:
            _write(html_file, to_html(reports, html_file.parent))
        if json_file == Path("-"):
            _print(to_json(reports))
            return
        if json_file is not None:
            _write(json_file, to_json(reports))
    _print(to_text(reports, shutil.get_terminal_size((100, 24)).columns))


def _parsed(arguments: Sequence[str]) -> tuple[argparse.Namespace, str]:
    """Returns the options, and the first that there is not; a `UsageError` names one without its value."""
    parser = argument_parser()
    parser.exit_on_error = False
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name}: {error.message}.") from None
    return options, next((word.partition("=")[0] for word in rest), "")


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="lightning-gradguard report",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="*", type=Path, help="folder of a run, or one that holds runs"
    )
    parser.add_argument(
        "--html",
        metavar="FILE",
        nargs="?",
        const=Path("report.html"),
        type=Path,
        help="write a page with charts as well, report.html in the current folder if no FILE is named",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const=Path("-"),
        type=Path,
        help="print the report as JSON, or write it to FILE; report/schema.json of the package describes it",
    )
    return parser


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # of `| head`; Python would write the rest when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from None
    how = "; open it in a browser" if path.suffix == ".html" else ""
    print(f"wrote {path.absolute()}{how}", file=sys.stderr)
