"""A step that raises: its batch is examined, and the last good state is written."""

from __future__ import annotations

from lightning_gradguard.core.incidents import OF_WEIGHTS, TrainingDivergedError
from lightning_gradguard.runtime.distributed import world_size
from lightning_gradguard.runtime.incidents.invalid_batches import was_raised_in_step
from lightning_gradguard.runtime.incidents.journal import run_folder
from lightning_gradguard.runtime.incidents.termination import save_last_good
from lightning_gradguard.runtime.rollback.fit_context import FitContext
from lightning_gradguard.runtime.rollback.reporter import IncidentReporter
from lightning_gradguard.runtime.steps.transaction import Window


def report_step_exception(
    error: BaseException, window: Window, fit: FitContext, reporter: IncidentReporter
) -> None:
    """Examines the batch whose step has raised, and writes the last good state. No other rank is asked.

    Nothing is done if the step is not at fault, or if it has never been finite and nothing is known of its
    values: that is a mistake in the code, which the traceback shows.
    """
    if not isinstance(error, Exception) or isinstance(error, TrainingDivergedError):
        return
    if not window.batches or not was_raised_in_step(error):
        return
    trainer, snapshots = fit.trainer, fit.snapshots
    result = fit.investigation.examine_exception(
        trainer,
        trainer.lightning_module,
        window.step,
        window.batches[-1],
        None if snapshots.is_empty else snapshots.newest(),
        run_folder(trainer),
        error,
        is_certain=fit.policy.has_good_step,
    )
    fit.side_effects.restore()
    if result is None:
        return
    if snapshots.is_empty:  # the weights are those that training starts from
        reporter.report_exception(error, result, None)
        return
    if result.origin.cause in OF_WEIGHTS or fit.state_is_nonfinite():
        snapshots.restore_newest(trainer)
    # a checkpoint of several ranks needs all of them
    last_good = save_last_good(trainer) if world_size() == 1 else None
    reporter.report_exception(error, result, last_good)
