"""Compares guards on healthy and failing programs.

`python -m benchmarks.evidence` takes about an hour on two idle cores and writes docs/evidence.md. It goes on
where it was stopped: records are in benchmarks/evidence/records.jsonl, one run a line. `--quick` runs one
seed of a few scenarios under three guards, in about three minutes, and prints the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

import lightning_gradguard
from benchmarks.evidence import tables
from benchmarks.evidence.guards import GUARDS
from benchmarks.evidence.runs import SCENARIOS, Record, run

RECORDS = Path(__file__).parent / "records.jsonl"
SEEDS = range(3)
Key = tuple[str, str, int]
#: Scenarios and guards of `--quick`.
QUICK = ("parabola", "digits momentum", "unfreezing", "gan", "early spikes", "parabola x100", "momentum x30")
QUICK_GUARDS = ("none", "zclip cap 1", "suite")


def environment() -> dict[str, str]:
    """Returns what figures depend on beside the code."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": version("pytorch_lightning"),
        "lightning_gradguard": lightning_gradguard.__version__,
        "machine": platform.machine(),
    }


def kept(path: Path) -> dict[Key, Record]:
    """Reads the records of a file; of two of one run the later."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    records = [Record(**row) for row in rows if "scenario" in row]
    known = [r for r in records if r.scenario in SCENARIOS and r.guard in GUARDS]
    return {(r.scenario, r.guard, r.seed): r for r in known}


def cases(scenarios: Sequence[str], guards: Sequence[str], seeds: Sequence[int]) -> Iterator[Key]:
    """Yields all runs; those of no guard and of the suite first."""
    first = [guard for guard in ("none", "suite") if guard in guards]
    others = [guard for guard in guards if guard not in first]
    for group, some in [(first, [s]) for s in seeds] + [([guard], list(seeds)) for guard in others]:
        yield from ((name, guard, seed) for seed in some for name in scenarios for guard in group)


def _run(key: Key) -> Record:
    torch.set_num_threads(1)
    return run(*key)


def complete(path: Path, keys: Sequence[Key], processes: int) -> dict[Key, Record]:
    """Runs what the file does not have yet, and appends each record at once."""
    records = kept(path)
    missing = [key for key in keys if key not in records]
    if not missing:
        return records
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with path.open("a", encoding="utf-8") as file, ProcessPoolExecutor(processes) as pool:
        print(json.dumps(environment()), file=file, flush=True)
        for record in pool.map(_run, missing):
            print(json.dumps(vars(record)), file=file, flush=True)
            records[record.scenario, record.guard, record.seed] = record
    return records


def main() -> None:
    """Runs, and writes or prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scenarios", nargs="*", default=list(SCENARIOS), metavar="NAME")
    parser.add_argument("--guards", nargs="*", default=list(GUARDS), metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), metavar="SEED")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("--page", type=Path, default=tables.PAGE)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tables-only", action="store_true", help="write the page from the records at hand")
    options = parser.parse_args()
    if options.quick:
        quick = Path("runs/evidence-quick.jsonl")
        quick.unlink(missing_ok=True)
        keys = list(cases(QUICK, QUICK_GUARDS, [0]))
        print(tables.page(complete(quick, keys, options.processes).values(), environment()))
        return
    keys = list(cases(options.scenarios, options.guards, options.seeds))
    records = complete(options.records, [] if options.tables_only else keys, options.processes)
    options.page.write_text(tables.page(records.values(), environment()), encoding="utf-8")


if __name__ == "__main__":
    main()
