"""Scalars of a logged step: norms by chart, and the band of usual total norms."""

from __future__ import annotations

from functools import partial

from lightning_gradguard.core import tags
from lightning_gradguard.runtime.logging.chart_groups import ChartGroups
from lightning_gradguard.runtime.steps.logged_step import LoggedNumbers, LoggedStep


def norm_scalars(
    step: LoggedStep,
    numbers: LoggedNumbers,
    charts: ChartGroups,
    band: tuple[float, float] | None,
    n_optimizers: int,
) -> dict[str, float]:
    """Returns the scalars of a logged step, by tag; a skipped step has no norm.

    Args:
        step: The logged step.
        numbers: Its numbers on the host.
        charts: Of the parameters of its optimizer.
        band: Low and high end of the usual total norms; `None` if too few were logged.
        n_optimizers: Number of optimizers.
    """
    tag = partial(tags.tag, optimizer=step.optimizer_index, of=n_optimizers)
    scalars = {tag(tags.NONFINITE_FRACTION): numbers.nonfinite_fraction}
    if not step.accepted:
        return scalars
    total = numbers.total_norm
    if band is not None:
        low, high = band
        scalars |= {tag(tags.BAND_LOW): low, tag(tags.BAND_TOTAL): total, tag(tags.BAND_HIGH): high}
    charted = {tags.GRAD_NORM: charts.norms(step.names, numbers.grad_norms)}
    if numbers.weight_norms:
        charted[tags.WEIGHT_NORM] = charts.norms(step.names, numbers.weight_norms)
    if numbers.update_ratios:
        pairs = zip(numbers.update_ratios, numbers.weight_norms, strict=True)
        updates = [ratio * weight for ratio, weight in pairs]
        charted[tags.UPDATE_RATIO] = charts.norms(step.names, updates, numbers.weight_norms)
    for form, values in charted.items():
        scalars |= {tag(form, chart): value for chart, value in values.items()}
    scalars[tag(tags.GRAD_NORM_TOTAL)] = total  # also where a module is called `total`
    return scalars
