"""Adapters to the loggers: scalars, text, figures, histograms, hyperparameters."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from html import escape
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from lightning_gradguard.core.tags import SETTINGS, is_band
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.logging.tensorboard_layout import decades, layout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Text is Markdown, a figure is a function that draws it, a histogram is a tensor of finite values.
Medium = Literal["text", "figure", "histogram"]


def write_scalars(logger: Any, scalars: Mapping[str, float], step: int) -> None:
    """Writes scalars; to TensorBoard also the log10 copies in its charts, and their layout."""
    if is_instance_by_name(logger, "TensorBoardLogger"):
        plain = {tag: value for tag, value in scalars.items() if not is_band(tag)}
        scalars = {**plain, **decades(scalars)}
        _update_layout(logger.experiment, scalars)
        writer = type(logger.experiment).__module__
        if lightning_api.is_plain_logger(logger) and writer == "torch.utils.tensorboard.writer":
            _write_in_one_event(logger.experiment, scalars, step)
            return
    logger.log_metrics(metrics=dict(scalars), step=step)  # as Lightning itself calls it


def _write_in_one_event(writer: Any, scalars: Mapping[str, float], step: int) -> None:
    """Writes what `add_scalar` writes of each scalar, in one event and not in one for each."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
    writer._get_file_writer().add_summary(Summary(value=values), step)


def write_medium(logger: Any, medium: Medium, tag: str, content: Any, step: int) -> None:
    """Writes text, a figure or a histogram; does nothing if the logger does not take it.

    W&B and MLflow are identified by the names of their classes, which both packages of Lightning share; for
    any other logger, its `experiment` has the methods of a `SummaryWriter`.
    """
    for name, writers in _WRITERS.items():
        if is_instance_by_name(logger, name):
            if medium in writers:
                writers[medium](logger, tag, content, step)
            return
    add = getattr(getattr(logger, "experiment", None), f"add_{medium}", None)
    if add is not None:
        if medium == "figure":
            _write_figure(content, lambda figure: add(tag, figure, step))
        else:
            add(tag, content, step)


def _write_figure(draw: Callable[[], Figure], write: Callable[[Figure], Any]) -> None:
    """Draws a figure and writes it, then frees its pixels: cycles of references keep it for long after."""
    from matplotlib.backend_bases import FigureCanvasBase

    figure = draw()
    write(figure)
    figure.clear()
    figure.set_canvas(FigureCanvasBase(figure))


def write_hyperparameters(logger: Any, settings: Mapping[str, Any]) -> None:
    """Writes settings beside the user's hyperparameters, without hiding any of them.

    TensorBoard gets none: it shows the hyperparameters of a run that were written first, and takes the
    columns of several runs from one.
    """
    if is_instance_by_name(logger, "WandbLogger"):
        logger.experiment.config.update({SETTINGS: dict(settings)}, allow_val_change=True)
    elif is_instance_by_name(logger, "MLFlowLogger"):
        logger.log_hyperparams({f"{SETTINGS}/{name}": value for name, value in settings.items()})


_seen_tags: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def _update_layout(writer: Any, tags: Collection[str]) -> None:
    """Updates TensorBoard's Custom Scalars when a new tag fills another chart."""
    seen = _seen_tags.setdefault(writer, set())
    if not seen.issuperset(tags):
        before = layout(seen)
        seen.update(tags)
        if (charts := layout(seen)) != before:
            writer.add_custom_scalars(charts)


#: MLflow keeps one file per name, and a step may have several texts.
_number = itertools.count()


def _wandb_text(logger: Any, tag: str, markdown: str, step: int) -> None:
    import wandb

    logger.log_metrics({tag: wandb.Html(f"<pre>{escape(markdown)}</pre>")}, step)


def _wandb_figure(logger: Any, tag: str, draw: Any, step: int) -> None:
    _write_figure(draw, lambda figure: logger.log_image(tag, [figure], step))


def _wandb_histogram(logger: Any, tag: str, values: Any, step: int) -> None:
    import wandb

    logger.log_metrics({tag: wandb.Histogram(values.numpy())}, step)


def _mlflow_text(logger: Any, tag: str, markdown: str, step: int) -> None:
    logger.experiment.log_text(logger.run_id, markdown, f"{tag}/{step:08d}-{next(_number)}.md")


def _mlflow_figure(logger: Any, tag: str, draw: Any, step: int) -> None:
    name = f"{tag}/{step:08d}.png"
    _write_figure(draw, lambda figure: logger.experiment.log_figure(logger.run_id, figure, name))


_WRITERS: dict[str, dict[Medium, Callable[[Any, str, Any, int], None]]] = {
    "WandbLogger": {"text": _wandb_text, "figure": _wandb_figure, "histogram": _wandb_histogram},
    "MLFlowLogger": {"text": _mlflow_text, "figure": _mlflow_figure},
}
