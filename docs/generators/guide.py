"""Writes the numbers of the guide's experiments into its page, and draws its pictures.

`make guide` takes about five minutes on two cores.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from docs.generators.experiments import ERRATIC, HUGE_WEIGHTS, THROUGH_TIME, VANISHING, Experiments, Run

PAGE = Path(__file__).parents[1] / "guide.md"
IMAGES = Path(__file__).parents[1] / "images"
#: Of weights, data and batches.
SEEDS = (0, 1, 2)
Row = tuple[str, ...]


def digit_row(name: str, runs: Sequence[Run]) -> Row:
    """Returns the row of an experiment on digits."""
    return (
        name,
        f"{median(run.first_norms()[0] for run in runs):.0e}",
        f"{median(run.first_norms()[-1] for run in runs):.0e}",
        *_outcome(runs),
        f"{median(run.accuracy for run in runs):.0%}",
        _count(run.trains for run in runs),
        _kinds(runs),
    )


def character_row(name: str, runs: Sequence[Run]) -> Row:
    """Returns the row of an experiment on text."""
    return (
        name,
        *_outcome(runs),
        _count(run.survived == len(run.losses) for run in runs),
        _count(run.trains for run in runs),
        _kinds(runs),
    )


def _outcome(runs: Sequence[Run]) -> Row:
    """The largest norm, and the loss at the end; a failed run is worse than any other."""
    loss = median(math.inf if math.isnan(run.final_loss) else run.final_loss for run in runs)
    return f"{median(run.largest_norm for run in runs):.0e}", "NaN" if loss == math.inf else f"{loss:.2f}"


def _count(which: Iterable[bool]) -> str:
    answers = list(which)
    return f"{sum(answers)}/{len(answers)}"


def _kinds(runs: Sequence[Run]) -> str:
    kinds = dict.fromkeys(kind for run in runs for kind in run.incidents)
    return ", ".join(f"`{kind}`" for kind in kinds) or "nothing"


DIGIT_HEAD = (
    "network", "first gradient", "last", "largest norm", "loss", "right", "train", "incidents"
)  # fmt: skip
CHARACTER_HEAD = ("network", "largest norm", "loss", "survive", "train", "incidents")
#: The tables of the page: experiments, number of batches, header, and a function that returns a row.
TABLES: dict[str, tuple[Experiments, int, Row, Callable[[str, Sequence[Run]], Row]]] = {
    "vanishing": (VANISHING, 400, DIGIT_HEAD, digit_row),
    "huge weights": (HUGE_WEIGHTS, 400, DIGIT_HEAD, digit_row),
    "through time": (THROUGH_TIME, 200, CHARACTER_HEAD, character_row),
    "erratic": (ERRATIC, 200, CHARACTER_HEAD, character_row),
}


def table(head: Row, rows: Iterable[Row]) -> str:
    """Rows in Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows))


def written(page: str, tables: Mapping[str, str]) -> str:
    """The page with these tables between its markers."""
    for name, content in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, rest = page.split(begin)
        page = before + begin + content + end + rest.split(end)[1]
    return page


def draw_vanishing(runs: Mapping[str, Run]) -> Figure:
    """Gradients layer by layer before the first step, and what became of the loss."""
    figure, (depth, loss) = _two_charts()
    for name, color in (
        ("sigmoid", "tab:red"),
        ("ReLU", "tab:orange"),
        ("ReLU, He", "tab:blue"),
        ("ReLU, residual", "tab:green"),
        ("sigmoid, batch norm", "tab:purple"),
    ):
        norms = runs[name].first_norms()
        depth.semilogy(range(1, len(norms) + 1), norms, "o-", markersize=3, color=color, label=name)
        loss.plot(_smooth(runs[name].losses), color=color)
    depth.set(title="gradient norm before step 1", xlabel="hidden layer")
    loss.set(title="training loss", xlabel="step", ylim=(0, 2.5))
    depth.legend(frameon=False, fontsize=9, loc="lower right")
    return figure


def draw_characters(runs: Mapping[str, Run], colors: Mapping[str, str]) -> Figure:
    """Loss and total gradient norm of some runs."""
    figure, (loss, norm) = _two_charts()
    for name, color in colors.items():
        run = runs[name]
        norms = run.series["grad_norm/total"]
        steps = [i * len(run.losses) / len(norms) for i in range(len(norms))]
        marker = "x" if run.survived < len(run.losses) else ""
        loss.plot(run.losses, color=color, label=name, marker=marker, markersize=5, linewidth=1.2)
        norm.semilogy(steps, norms, color=color, marker=marker, markersize=5, linewidth=1.2)
    loss.set(title="training loss", xlabel="batch", yscale="log", ylim=(1.3, 20))
    loss.set_yticks([2, 4, 8, 16], ["2", "4", "8", "16"])
    loss.minorticks_off()
    norm.set(title="total gradient norm, before clipping", xlabel="batch")
    loss.legend(frameon=False, fontsize=9)
    return figure


def _two_charts() -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    charts: Sequence[Axes] = figure.subplots(1, 2)
    for axes in charts:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, charts


def _smooth(losses: Sequence[float]) -> list[float]:
    return [fmean(losses[max(0, i - 10) : i + 1]) for i in range(len(losses))]


def main() -> None:
    """Run everything, and write the page."""
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the same sums on every machine
    runs: dict[str, dict[str, Run]] = {}
    tables = {}
    for name, (experiments, steps, head, row) in TABLES.items():
        outcomes = {what: [run(steps, seed) for seed in SEEDS] for what, run in experiments.items()}
        runs[name] = {what: repeated[0] for what, repeated in outcomes.items()}
        tables[name] = table(head, (row(*outcome) for outcome in outcomes.items()))
        print(tables[name], flush=True)
    PAGE.write_text(written(PAGE.read_text(), tables))
    pictures = {
        "vanishing": draw_vanishing(runs["vanishing"]),
        "through_time": draw_characters(
            runs["through time"],
            {
                "ReLU, gain 1.1": "tab:red",
                "clipping to norm 1": "tab:blue",
                "learning rate / 100": "tab:gray",
                "max-norm": "tab:green",
                "LSTM, learning rate * 10": "tab:purple",
            },
        ),
        "erratic": draw_characters(
            runs["erratic"],
            {
                "tanh, gain 1.1, learning rate 2": "tab:red",
                "clipping to norm 1": "tab:blue",
                "LSTM": "tab:purple",
            },
        ),
    }
    for name, figure in pictures.items():
        figure.savefig(IMAGES / f"{name}.png", dpi=100)


if __name__ == "__main__":
    main()
