"""The rule of a loss with several terms, of which others outweigh that of the targets."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_gradguard.core.detectors.best_constant import STUCK
from lightning_gradguard.core.detectors.diagnosis.progress import Progress
from lightning_gradguard.core.detectors.diagnosis.rules import AT_CONSTANT, PRESSED_STEPS, SAME_BESIDE
from lightning_gradguard.core.detectors.diagnosis.sample import Sample
from lightning_gradguard.core.detectors.diagnosis.symptom import Symptom

#: The first loss over what the term of the targets adds to it with the best constant answer, from which on
#: other terms outweigh that one; likewise the weight of a divergence over that beside a sum.
OUTWEIGHED = 5.0
#: The first divergence over one that is pressed down for good: healthy ones fall to a ninth, and rise again.
PRESSED = 16.0


def outweighing_terms(sample: Sample, progress: Progress, patience: int) -> Iterator[Symptom]:
    """Yields a term of the loss that is no better than a constant, beside others that outweigh it."""
    ratio, (divergence, line) = progress.over_constant, sample.divergence
    call = next((call for call in sample.calls if call.weight * call.constant > 0), None)
    if call is None or not STUCK < ratio < AT_CONSTANT or sample.step < PRESSED_STEPS:
        return
    share = progress.first / (call.weight * call.constant)
    over_usual = divergence * call.n_per_row / call.weight
    first, before, now = progress.others
    # what latents know of the inputs is pressed down to nothing, with all that answers differ by
    if over_usual > OUTWEIGHED and now < min(first / PRESSED, before):
        words = (
            f"the divergence at {line} weighs {over_usual:.3g} times as much as beside a sum over features"
        )
    else:
        is_pressed = sample.loss < AT_CONSTANT * call.weight * call.value
        is_one = sample.spread < SAME_BESIDE and not progress.spreads_out
        if progress.began_whole or not share > OUTWEIGHED:
            return
        if not (is_pressed or is_one or sample.step >= patience):
            return
        words = f"all terms of the loss began at {share:.3g} times what it adds with that answer"
    evidence = f"{call.function}{call.place} is {ratio:.3g} times that of the best constant answer; {words}"
    yield Symptom("stuck_loss", "second_term", sample.head, ratio, evidence, "stuck", 2)
