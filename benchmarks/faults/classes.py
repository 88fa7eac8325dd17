"""The classes of faults, with their effect on a run, and if a run can survive it.

This table was committed before the campaign first ran. A kind that turns out to be wrong here is corrected in
a commit of its own that states it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FaultClass:
    """One kind of fault.

    Args:
        what: The effect on the run, once.
        cause: The cause that the suite has to name, whenever the fault makes a number nonfinite or corrupts
            the weights; empty if there is none.
        survivable: True if a run can end as it would without the fault.
        why_not: The reason, where it cannot.
        precision: The only precision it exists in; empty for all.
        model: The only model it exists in; empty for all.
        optimizer: The only optimizer it exists in; empty for all.
        is_automatic: True if it exists in automatic optimization alone.
        skips_invalid_batches: The argument of `NaNRollback`.
        is_reported: True for a fault that was added after programs of others were rebuilt.
    """

    what: str
    cause: str
    survivable: bool = True
    why_not: str = ""
    precision: str = ""
    model: str = ""
    optimizer: str = ""
    is_automatic: bool = False
    skips_invalid_batches: bool = False
    is_reported: bool = False


#: A run must survive every survivable fault, in every model, optimizer, precision and at every time below.
FAULTS = {
    "NaN input": FaultClass("one element of the batch is NaN", "bad_input"),
    "Inf input": FaultClass("one element of the batch is infinite", "bad_input"),
    "huge input": FaultClass("the batch is 1e20 times too large", "bad_input"),
    "log(0)": FaultClass("the loss takes the logarithm of zero", "loss"),
    "division by zero": FaultClass("the loss divides zero by zero", "loss"),
    "sqrt at 0": FaultClass("the loss is finite, and has a square root of zero in it", "backward_pass"),
    "ignored labels": FaultClass("all labels of the batch are to be ignored: a mean of nothing", "loss"),
    "masked row": FaultClass(
        "the attention mask hides all positions of one sample", "forward_pass", model="transformer"
    ),
    "fp16 overflow": FaultClass(
        "the batch is 1e5 times too large for float16", "forward_pass", precision="16-mixed"
    ),
    "flip in a weight": FaultClass(
        "the top exponent bit of one element of a weight flips", "corrupted_weights"
    ),
    "flip in a gradient": FaultClass(
        "the top exponent bit of one element of a gradient flips, after ranks have averaged it", ""
    ),
    "NaN in a gradient": FaultClass(
        "one element of a gradient becomes NaN, after ranks have averaged it", "transient"
    ),
    "flip in the optimizer": FaultClass(
        "the top exponent bit of one element of the optimizer's first state tensor flips", "corrupted_weights"
    ),
    "learning rate": FaultClass("the learning rate is 10,000 times larger in one step", "update_too_large"),
    "exception": FaultClass(
        "`torch.distributions` raises on a NaN of the batch, and the batch is skipped",
        "bad_input",
        is_automatic=True,
        skips_invalid_batches=True,
        is_reported=True,
    ),
    "index": FaultClass(
        "one label is a class that does not exist, and the batch is skipped",
        "bad_input",
        is_automatic=True,
        skips_invalid_batches=True,
        is_reported=True,
    ),
    "statistics of 1e9": FaultClass("one element of the batch is 1e9", "bad_input", is_reported=True),
    "compiled only": FaultClass(
        "code that `torch.compile` has made gives NaN, the same code without it does not",
        "compiled_code",
        is_reported=True,
    ),
    "outlier of 200 sigma": FaultClass(
        "one sample is 200 times too large, and an exponent of it 88", "loss", is_reported=True
    ),
    "outlier of 400 sigma": FaultClass(
        "one sample is 400 times too large, and an exponent of it 176", "loss", is_reported=True
    ),
    "epsilon in float16": FaultClass(
        "Adam with its default epsilon trains weights in float16, where that is 0",
        "optimizer_epsilon",
        survivable=False,
        why_not="no learning rate avoids it; the run ends with an error that names the epsilon to use",
        precision="16-true",
        optimizer="Adam",
        is_reported=True,
    ),
    "label out of range": FaultClass(
        "one label is a class that does not exist",
        "bad_input",
        survivable=False,
        why_not="torch raises IndexError before there is a number to check (on a GPU it invalidates the "
        "context); the run ends with that error, and checkpoints stay finite",
    ),
    "flip before the first step": FaultClass(
        "as `flip in a weight`, in the weights that training starts from",
        "",
        survivable=False,
        why_not="there is no earlier state to roll back to",
    ),
    "small flip on one rank": FaultClass(
        "a bit of the mantissa of a weight flips on one rank of two",
        "",
        survivable=False,
        why_not="no number changes by more than noise; the ranks then train slightly different weights, "
        "which only a checksum of all weights would detect",
    ),
}

#: When a fault happens.
TIMES = {
    "first step": "in the first step (for weights and optimizer state: right after it)",
    "warm-up": "in step 12, before detectors have history and clipping has its statistics",
    "steady": "in step 70",
    "accumulation": "in one of two accumulated batches, around step 35",
    "last batch": "in the last batch of the first epoch",
    "resume": "in the first batch after a resume (for weights and optimizer state: right after it)",
}
