"""Draws the README's picture: `python -m docs.generators.demo_picture RUNS docs/images/demo.png`."""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def series(run: Path, tag: str) -> tuple[list[int], list[float]]:
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    points = events.Scalars(tag)
    return [p.step for p in points], [p.value for p in points]


def main(runs: Path, picture: Path) -> None:
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    loss, norm = figure.subplots(1, 2)
    steps, values = series(runs / "bare", "train_loss")
    survived = sum(value == value for value in values)
    loss.plot(steps[:survived], values[:survived], "o-", color="tab:red", label="Lightning alone")
    loss.axvline(survived - 1, color="tab:red", linestyle=":", label=f"NaN after {survived} steps")
    loss.plot(*series(runs / "guarded", "train_loss"), color="tab:blue", label="with the suite")
    loss.set(title="training loss", xlabel="step", ylabel="nats a character", yscale="log", ylim=(1.4, 40))
    loss.set_yticks([2, 4, 8, 16, 32], ["2", "4", "8", "16", "32"])
    loss.minorticks_off()
    loss.legend(frameon=False)
    norm.semilogy(*series(runs / "guarded", "grad_norm/total"), color="tab:gray", label="before clipping")
    clipped = series(runs / "guarded", "grad_norm_clipped/total")
    norm.semilogy(*clipped, color="tab:blue", label="after clipping")
    norm.set(title="total gradient norm, with the suite", xlabel="step")
    norm.legend(frameon=False)
    for axes in (loss, norm):
        axes.spines[["top", "right"]].set_visible(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
