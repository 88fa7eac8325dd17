"""Runs the programs of published benchmarks with and without the suite.

`python -m benchmarks.third_party` goes on where it was stopped: records are in
benchmarks/third_party/records.jsonl, one program a line; then it writes docs/evidence_third_party.md.
"""

from __future__ import annotations

import argparse
import json
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from benchmarks.evidence.__main__ import environment
from benchmarks.third_party import tables
from benchmarks.third_party.runs import CASES, Record, run

RECORDS = Path(__file__).parent / "records.jsonl"
Key = tuple[str, str, int]


def kept(path: Path) -> dict[Key, Record]:
    """Reads the records of a file; of two of one program the later."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    records = [Record(**row) for row in map(json.loads, lines) if "benchmark" in row]
    return {(r.benchmark, r.name, r.seed): r for r in records if (r.benchmark, r.name) in CASES}


def _run(key: Key) -> Record:
    torch.set_num_threads(1)
    return run(key[:2], key[2])


def main() -> None:
    """Runs what is missing, and writes the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.third_party", description=__doc__)
    parser.add_argument("--only", default="", help="programs whose benchmark or name has this in it")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0], metavar="SEED")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--page", type=Path, default=tables.PAGE)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tables-only", action="store_true", help="write the page from the records at hand")
    options = parser.parse_args()
    records = kept(options.records)
    keys = [(*key, seed) for seed in options.seeds for key in CASES if options.only in " ".join(key)]
    missing = [key for key in keys if key not in records and not options.tables_only]
    if missing:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        with (
            options.records.open("a", encoding="utf-8") as file,
            ProcessPoolExecutor(options.processes) as pool,
        ):
            print(json.dumps(environment()), file=file, flush=True)
            for record in pool.map(_run, missing):
                print(json.dumps(vars(record)), file=file, flush=True)
                records[record.benchmark, record.name, record.seed] = record
    options.page.write_text(tables.page(records.values(), environment()), encoding="utf-8")


if __name__ == "__main__":
    main()
