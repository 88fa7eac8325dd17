"""Rules about mistakes in code and data: how a loss is called, which parameters are trained, and how."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_gradguard.core.detectors.best_constant import LEARNS
from lightning_gradguard.core.detectors.diagnosis.progress import Progress
from lightning_gradguard.core.detectors.diagnosis.sample import Sample
from lightning_gradguard.core.detectors.diagnosis.symptom import Symptom, modules_of
from lightning_gradguard.core.incidents import SymptomCause

#: Loss below which the squares of its gradients underflow float32.
UNDERFLOW = 1e-15
#: Steps before which labels of one class may be those of the first files alone.
LABEL_STEPS = 25
#: Step from which on targets that do not depend on the inputs explain a loss that does not fall.
DATA_STEPS = 25
#: Steps after which what may be meant, as in a side branch, is a mistake if nothing is learned.
MEANT_STEPS = 20
#: The causes of these, of which an inverted mask is certain where it shows what is asked for; and the share
#: of one of later steps in other networks, which may read backwards.
MAY_BE_MEANT, HALF = ("single_value", "softmax_over_batch", "dropout", "inverted_mask"), 0.5
#: Change of the loss by permuted targets up to which the network answers all inputs alike, but for rounding.
ALIKE = 1e-6
#: Lowest loss over the first one down to which epochs have trained weights that are reset on purpose.
TRAINED = 0.7
#: The smallest share of targets out of reach that explains a loss that is stuck.
SOME_UNREACHABLE = 0.05
#: Shares of a loss call that break its contract.
CONTRACT: dict[SymptomCause, tuple[float, str]] = {
    "softmax_before_loss": (0.9, "the loss expects logits and gets probabilities"),
    "single_class": (0.9, "a softmax over one output is always 1"),
    "not_log_probabilities": (0.9, "the loss expects log-probabilities (logsumexp 0) and gets other values"),
    "broadcast_targets": (0.9, "shapes (n, 1) and (n,) broadcast to (n, n): all answers meet all targets"),
    "labels_ignored": (0.9, "every label is ignored"),
    "targets_out_of_range": (0.01, "targets are outside of the range that the loss expects"),
    "unreachable_targets": (0.5, "targets are outside of the range of the output's activation"),
    "single_value": (0.5, "statistics of one value normalize it to 0, of two to 1 and -1, whatever they are"),
    "softmax_over_batch": (1, "a softmax over the batch, not over the classes or the steps of a sample"),
    "batch_as_time": (1, "the first dimension is the batch, and the module takes it for the time"),
    "view_for_transpose": (
        1,
        "a view exchanges dimensions and keeps the order of the numbers: it mixes them",
    ),
    "dropout": (1, "of each input, dropout leaves a tenth or less: p is the share that is set to zero"),
    "inverted_mask": (
        0.75,
        "attention is to padding alone, or to later steps and to no earlier one",
    ),
}


def broken_contracts(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields loss calls with inputs or targets that the loss does not expect."""
    for call in sample.calls:
        for cause, share in call.flags.items():
            bound, words = CONTRACT[cause]
            needs = 2
            if cause == "unreachable_targets":
                if call.function == "difference" and not sample.one_signed:
                    continue
                if sample.step >= 20 and share >= SOME_UNREACHABLE and progress.over_constant > LEARNS:
                    bound, needs = SOME_UNREACHABLE, 3
            if share >= bound:
                name = "a difference" if call.function == "difference" else call.function
                of_some = f" ({share:.0%} of the values)" if share < 1 else ""
                evidence = f"{name}{call.place}: {words}{of_some}"
                yield Symptom(
                    "stuck_loss",
                    cause,
                    sample.head,
                    share,
                    evidence,
                    "contract",
                    needs,
                    arguments=call.arguments,
                )


def wrong_dimensions(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields what is computed over another dimension than is meant, the first place of each cause.

    What may be meant is yielded once the loss does not fall, or the network is seen to answer all alike.
    """
    is_late = sample.step >= MEANT_STEPS
    for symptom in mistakes(sample, HALF if is_late else CONTRACT["inverted_mask"][0]):
        is_stuck = is_late and not progress.learns
        if symptom.cause == "softmax_over_batch":  # a loss by hand falls, as samples compete for a class
            is_stuck = is_late and not progress.over_constant < LEARNS
        if symptom.cause == "single_value" and symptom.value == 1 and not math.isnan(sample.permuted):
            is_stuck &= abs(sample.permuted) < ALIKE  # in a side branch, it does no harm
        is_leak = symptom.cause == "inverted_mask" and symptom.value >= 1
        if symptom.cause not in MAY_BE_MEANT or is_leak or is_stuck:
            yield symptom


def mistakes(sample: Sample, of_masks: float) -> Iterator[Symptom]:
    """Yields what may be computed over another dimension than is meant; masks from a share on."""
    found = set()
    for cause, name, share in sample.mistakes:
        bound, words = CONTRACT[cause]
        if share >= (of_masks if cause == "inverted_mask" else bound) and cause not in found:
            found.add(cause)
            where = (name,) if name else sample.entry
            evidence = f"{', '.join(where)}: {words}"
            yield Symptom("stuck_loss", cause, where, share, evidence, "contract")


def constant_inputs(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields inputs that are the same in every row of the batch, while the targets differ."""
    if sample.inputs_are_constant:
        where = tuple(layer.name for layer in sample.layers[:1])
        evidence = "all rows of the inputs are the same, and their targets differ"
        yield Symptom("stuck_loss", "constant_input", where, math.nan, evidence, "contract", 3)


def labels_of_one_class(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields labels that have all been of one class, or that smoothing has made alike."""
    for call in sample.calls:
        if call.constant == 0 and sample.step >= LABEL_STEPS:
            evidence = (
                f"{call.function}: all labels of the sampled steps are of one class, or smoothed to one"
            )
            yield Symptom("stuck_loss", "constant_target", sample.head, math.nan, evidence, "contract", 3)


def unrelated_targets(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields targets that do not depend on the inputs, in a network that learns nothing."""
    # a discriminator that is fooled has targets that no longer depend on its inputs
    if progress.may_be_unrelated and progress.is_unrelated and len(sample.updates) <= 1:
        evidence = (
            "the loss does not fall, and rows that are alike have targets that are as far apart as others"
        )
        yield Symptom("stuck_loss", "unrelated_targets", sample.head, math.nan, evidence, "stuck", 2)


def untrained_parameters(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields parameters that get a gradient and are held by no optimizer, or are held and get none."""
    found = sample.coverage
    if found.unheld:
        cause: SymptomCause = "replaced_parameters" if found.orphans else "not_in_optimizer"
        evidence = f"{len(found.unheld)} parameters get gradients, and no optimizer holds them"
        if found.orphans:
            evidence += f"; optimizers hold {found.orphans} that are no longer in the module"
        where = modules_of(found.unheld)
        yield Symptom("weight_stagnation", cause, where, len(found.unheld), evidence, "coverage")
    if found.detached:
        evidence = f"{len(found.detached)} parameters take part in the forward pass and get no gradient"
        where = modules_of(found.detached)
        yield Symptom("weight_stagnation", "detached", where, len(found.detached), evidence, "coverage", 3)
    for cause, names, words in (
        ("not_registered", found.unregistered, "get gradients, and no module has registered them"),
        ("never_stepped", found.unstepped, "get gradients, and their optimizer has never stepped"),
        ("cleared_gradients", found.cleared, "have no gradient whenever their optimizer steps"),
    ):
        if names:
            if cause == "cleared_gradients" and all(math.isnan(layer.gradient) for layer in sample.layers):
                cause, words = "constant_loss", "get no gradient, nor does the output of any layer"
            evidence = f"{len(names)} parameters {words}"
            yield Symptom("weight_stagnation", cause, modules_of(names), len(names), evidence, "coverage")


def reset_weights(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields weights that are others in each epoch, whereby the loss is back at the first.

    Where it falls in between, they are those of folds, or of a network that is pruned.
    """
    if sample.n_resets > 1 and progress.rise > LEARNS and progress.lowest > TRAINED:
        where = tuple(layer.name for layer in sample.layers)[:5]
        evidence = (
            f"at the ends of {sample.n_resets} epochs, most weights have changed by more than half of their "
            f"norm, and the loss is back at {progress.rise:.3g} times the first"
        )
        yield Symptom(
            "stuck_loss", "overwritten_weights", where, sample.n_resets, evidence, "coverage", needs=1
        )


def kept_gradients(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields steps whose gradients still have those of the steps before in them."""
    if sample.keeps_gradients:
        names = [name for one in sample.updates for name in one.steepest]
        evidence = "the gradients of a step are its own plus those of the step before: they are never cleared"
        where = modules_of(names)
        yield Symptom("exploding_gradient", "gradients_not_cleared", where, math.nan, evidence, "contract")


def has_no_gradient(sample: Sample, progress: Progress) -> bool:
    """True if the gradient at every layer's output is exactly zero, and the loss is not."""
    gradients = [g for layer in sample.layers for g in layer.gradients if not math.isnan(g)]
    has_loss = progress.is_constant or not abs(sample.loss) <= 1e-3 * abs(progress.first)
    return bool(gradients) and not any(gradients) and has_loss and sample.step > 0


def constant_loss(sample: Sample, progress: Progress) -> Iterator[Symptom]:
    """Yields a loss that does not depend on the network, from the start or any more."""
    if has_no_gradient(sample, progress):
        evidence = "the gradient at the output of every layer is exactly zero, and the loss is "
        evidence += "not" if sample.loss else "0 since the start"
        cause: SymptomCause = "zero_gradient" if progress.had_gradient else "constant_loss"
        if 0 < abs(sample.loss) < UNDERFLOW:
            cause, evidence = "tiny_gradient", f"the loss is {sample.loss:.1g}, and its gradients underflow"
        yield Symptom("stuck_loss", cause, sample.head, sample.loss, evidence, "stuck", 3)
