"""What each logger takes, and how."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from html import escape
from typing import Any, Literal
from weakref import WeakKeyDictionary

from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.logging.tensorboard_layout import decades, layout

#: Text is Markdown, a figure a function that draws it, a histogram is made of a tensor of finite values.
Medium = Literal["text", "figure", "histogram"]


def write_scalars(logger: Any, scalars: Mapping[str, float], step: int) -> None:
    """Give a logger scalars; TensorBoard gets their decades as well, and the charts that they fill."""
    if is_instance_by_name(logger, "TensorBoardLogger"):
        scalars = {**scalars, **decades(scalars)}
        _arrange(logger.experiment, scalars)
    logger.log_metrics(dict(scalars), step=step)


def write_medium(logger: Any, medium: Medium, tag: str, content: Any, step: int) -> None:
    """Give a logger what is no scalar; nothing happens if it has no place for that.

    W&B and MLflow are known by the names of their classes, which both packages of Lightning share; any other
    logger takes what its `experiment` has the method of a `SummaryWriter` for.
    """
    for name, ways in _WAYS.items():
        if is_instance_by_name(logger, name):
            if medium in ways:
                ways[medium](logger, tag, content, step)
            return
    add = getattr(getattr(logger, "experiment", None), f"add_{medium}", None)
    if add is not None:
        add(tag, content() if medium == "figure" else content, step)


def write_hyperparameters(logger: Any, settings: Mapping[str, Any]) -> None:
    """Put settings beside the hyperparameters of a run, where none of the user's can be hidden by them.

    Not TensorBoard's: of the hyperparameters of a run it shows those that were written first, and of several
    runs it takes the columns from one.
    """
    if is_instance_by_name(logger, "WandbLogger"):
        logger.experiment.config.update({"gradguard": dict(settings)}, allow_val_change=True)
    elif is_instance_by_name(logger, "MLFlowLogger"):
        logger.log_hyperparams({f"gradguard/{name}": value for name, value in settings.items()})


_seen: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _arrange(writer: Any, tags: Collection[str]) -> None:
    """Arrange TensorBoard's Custom Scalars anew when a tag has come that fills another chart."""
    seen = _seen.setdefault(writer, set())
    if not seen.issuperset(tags):
        before = layout(seen)
        seen.update(tags)
        if (charts := layout(seen)) != before:
            writer.add_custom_scalars(charts)


#: MLflow has one file for a name, and a step may have several texts.
_number = itertools.count()


def _wandb_text(logger: Any, tag: str, markdown: str, step: int) -> None:
    import wandb

    logger.log_metrics({tag: wandb.Html(f"<pre>{escape(markdown)}</pre>")}, step)


def _wandb_figure(logger: Any, tag: str, draw: Any, step: int) -> None:
    logger.log_image(tag, [draw()], step)


def _wandb_histogram(logger: Any, tag: str, values: Any, step: int) -> None:
    import wandb

    logger.log_metrics({tag: wandb.Histogram(values.numpy())}, step)


def _mlflow_text(logger: Any, tag: str, markdown: str, step: int) -> None:
    logger.experiment.log_text(logger.run_id, markdown, f"{tag}/{step:08d}-{next(_number)}.md")


def _mlflow_figure(logger: Any, tag: str, draw: Any, step: int) -> None:
    logger.experiment.log_figure(logger.run_id, draw(), f"{tag}/{step:08d}.png")


_WAYS: dict[str, dict[Medium, Callable[[Any, str, Any, int], None]]] = {
    "WandbLogger": {"text": _wandb_text, "figure": _wandb_figure, "histogram": _wandb_histogram},
    "MLFlowLogger": {"text": _mlflow_text, "figure": _mlflow_figure},
}
