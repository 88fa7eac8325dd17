"""The part of the table for single operations of the forward pass, and the whole table.

A cure is Python code that works when it is pasted: `x` is the operation's argument, `y` the second one. For
each entry, a test runs a program that has the fault, and trains the same program with the cure. More specific
entries are first.
"""

from __future__ import annotations

from lightning_gradguard.core.forensics.faults.of_functions import FUNCTIONS, LOSSES, MASKS, UNDERFLOW
from lightning_gradguard.core.forensics.faults.of_gradients import BACKWARD
from lightning_gradguard.core.forensics.operations import OperationFault as Fault

_HALF = ("float16",)
_MATMUL = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "matmul", "linear")

_LOGARITHMS = (
    Fault(
        ("log", "log2", "log10"),
        "The logarithm underflows in float16: its argument is below 6e-8, also a sum with an epsilon of 1e-8",
        "torch.log(x.float().clamp_min(1e-7))",
        at_most=0.0,
        has_zero=True,
        dtypes=_HALF,
    ),
    Fault(
        ("log", "log2", "log10"),
        "The logarithm of a negative number is NaN",
        "torch.log(x.clamp_min(1e-6))",
        at_most=-1e-45,
        made="nan",
    ),
    Fault(
        ("log", "log2", "log10"),
        "The logarithm of 0 is -inf",
        "torch.log(x.clamp_min(1e-6))",
        has_zero=True,
    ),
    Fault(
        ("log1p",),
        "log1p of -1 or less is -inf or NaN",
        "torch.log1p(x.clamp_min(-1 + 1e-6))",
        at_most=-1.0,
    ),
    Fault(
        ("xlogy",),
        "xlogy with a second argument of 0 is -inf",
        "torch.xlogy(x, y.clamp_min(1e-6))",
        argument=None,
    ),
    Fault(
        ("special_xlog1py",),
        "xlog1py with a second argument of -1 is -inf",
        "torch.special.xlog1py(x, y.clamp_min(-1 + 1e-6))",
        argument=None,
    ),
    Fault(
        ("logit",),
        "The logit of 0 or 1 is infinite: keep its argument inside the open interval",
        "torch.logit(x, eps=1e-6)",
        argument=None,
    ),
    Fault(
        ("logsumexp",),
        "A row is -inf throughout (all of it masked): its logsumexp is -inf",
        "torch.nan_to_num(x, neginf=-1e4).logsumexp(-1)",
    ),
    Fault(
        ("_log_softmax",),
        "A row is -inf throughout (all of it masked), or a score is +inf: log_softmax of it is NaN",
        "x.clamp(-1e4, 1e4).log_softmax(-1)",
    ),
    Fault(
        ("_softmax",),
        "A row is -inf throughout (a mask that hides all positions), or a score is +inf: its softmax is 0/0",
        "torch.softmax(x.clamp(-1e4, 1e4), -1)",
    ),
)

_EXPONENTIALS = (
    Fault(
        ("pow",),
        "The power exceeds 65504, the largest number of float16: compute it in float32",
        "x.float().pow(y)",
        dtypes=_HALF,
        made="inf",
    ),
    Fault(
        ("exp", "exp2", "expm1", "sinh", "cosh"),
        "The result exceeds 65504, the largest number of float16 (exp overflows above 11)",
        "torch.exp(x.float().clamp(max=20))",
        dtypes=_HALF,
        at_least=11.0,
    ),
    Fault(
        ("exp",),
        "exp overflows float32 above 88, and its square above 44: bound the exponent (a log-variance for "
        "instance to "
        "-30..20), or use softplus; of a sum of exponentials use torch.logsumexp",
        "torch.exp(x.clamp(max=20))",
        at_least=20.0,
    ),
    Fault(
        ("exp2",),
        "exp2 overflows float32 above 128: bound the exponent",
        "torch.exp2(x.clamp(max=30))",
        at_least=30.0,
    ),
    Fault(
        ("expm1",),
        "expm1 overflows float32 above 88: bound the exponent",
        "torch.expm1(x.clamp(max=20))",
        at_least=20.0,
    ),
    Fault(
        ("sinh", "cosh"),
        "sinh and cosh overflow float32 beyond +-89: bound their argument",
        "torch.sinh(x.clamp(-20, 20))",
        argument=None,
    ),
    Fault(
        ("linalg_matrix_exp",),
        "The matrix exponential overflows: bound the matrix",
        "torch.linalg.matrix_exp(x / (1 + x.norm()))",
    ),
    Fault(
        ("i0", "special_i0", "special_i1"),
        "The Bessel function overflows like exp: use the scaled one, and add its logarithm",
        "torch.special.i0e(x)",
        argument=None,
    ),
)

_DIVISIONS = (
    Fault(
        ("div", "true_divide", "reciprocal", "rsqrt"),
        "A divisor is 0 in float16, where an epsilon below 6e-8 is 0 too",
        "x.float() / y.float().clamp_min(1e-6)",
        argument=None,
        has_zero=True,
        dtypes=_HALF,
    ),
    Fault(
        ("div", "true_divide"),
        "A divisor of either sign is 0",
        "x / torch.where(y.abs() < 1e-6, 1.0, y)",
        argument=1,
        has_zero=True,
        at_most=-1e-45,
    ),
    Fault(
        ("reciprocal",),
        "A divisor of either sign is 0",
        "1 / torch.where(x.abs() < 1e-6, 1.0, x)",
        has_zero=True,
        at_most=-1e-45,
    ),
    Fault(
        ("div", "true_divide"),
        "0 is divided by 0 (0/0): a mean over an empty selection, a standard deviation or a norm of 0",
        "x / y.clamp_min(1e-6)",
        argument=1,
        has_zero=True,
        made="nan",
    ),
    Fault(
        ("div", "true_divide"),
        "The divisor is 0",
        "x / torch.where(y < 1e-6, 1.0, y)",
        argument=1,
        has_zero=True,
    ),
    Fault(("div", "true_divide"), "The divisor is 0", "x / (y or 1)", number_at_most=0.0),
    *(
        Fault(
            ("div", "true_divide"),
            "Divided by a number far below 1, the result overflows: bound the divisor from below",
            cure,
            argument=None,
            number_at_most=number,
        )
        for number, cure in ((1e-3, "x / max(y, 1e-6)"), (None, "x / y.clamp_min(1e-6)"))
    ),
    Fault(("reciprocal",), "The divisor is 0", "1 / torch.where(x < 1e-6, 1.0, x)", has_zero=True),
    Fault(("rsqrt",), "rsqrt of a negative number is NaN", "torch.rsqrt(x.clamp_min(1e-6))", at_most=-1e-45),
    Fault(("rsqrt",), "rsqrt of 0 is infinite: add an epsilon", "torch.rsqrt(x + 1e-6)", has_zero=True),
    Fault(
        ("fmod", "remainder"),
        "The remainder of a division by 0 is NaN",
        "torch.remainder(x, y.clamp_min(1e-6))",
        argument=None,
    ),
)

_POWERS = (
    Fault(
        ("sqrt",),
        "The square root of a negative number is NaN",
        "torch.sqrt(x.clamp_min(1e-6))",
        at_most=-1e-45,
    ),
    Fault(
        ("pow", "float_power"),
        "The power of large numbers overflows: bound them",
        "x.clamp(-1e3, 1e3).pow(y)",
        argument=None,
        beyond=1e3,
    ),
    Fault(
        ("pow", "float_power"),
        "0 to a negative power is infinite",
        "torch.where(x.abs() < 1e-6, 1.0, x).pow(y)",
        has_zero=True,
        made="inf",
    ),
    Fault(
        ("pow", "float_power"),
        "A negative number to a power that is no whole number is NaN",
        "x.clamp_min(1e-6).pow(y)",
        at_most=-1e-45,
        made="nan",
    ),
    Fault(
        ("prod", "cumprod"),
        "The product of large numbers overflows: add logarithms instead",
        "x.abs().clamp_min(1e-6).log().sum(-1)",
        argument=None,
        beyond=1e3,
    ),
)

_TRIGONOMETRY = (
    Fault(("acos", "asin"), "acos and asin beyond -1..1 are NaN", "torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))"),
    Fault(("acosh",), "acosh below 1 is NaN", "torch.acosh(x.clamp_min(1 + 1e-6))"),
    Fault(
        ("atanh",),
        "atanh at -1 or 1 is infinite, and NaN beyond",
        "torch.atanh(x.clamp(-1 + 1e-6, 1 - 1e-6))",
    ),
    Fault(
        ("erfinv",),
        "erfinv at -1 or 1 is infinite, and NaN beyond",
        "torch.erfinv(x.clamp(-1 + 1e-6, 1 - 1e-6))",
    ),
    Fault(
        ("special_ndtri",),
        "The normal quantile of 0 or 1 is infinite",
        "torch.special.ndtri(x.clamp(1e-6, 1 - 1e-6))",
    ),
    Fault(
        ("lgamma", "digamma", "polygamma", "mvlgamma"),
        "lgamma and digamma have poles at 0 and at negative whole numbers",
        "torch.lgamma(x.clamp_min(1e-6))",
        argument=None,
    ),
    Fault(
        ("tan",),
        "tan has poles at odd multiples of pi/2: its value or gradient overflows",
        "torch.tan(x.clamp(-1.5, 1.5))",
    ),
)

_STATISTICS = (
    Fault(
        ("mean", "median", "nanmedian"),
        "The mean or median of an empty selection is NaN: count what is selected",
        "x.sum() / max(x.numel(), 1)",
        is_empty=True,
    ),
    Fault(
        ("std", "var", "var_mean", "std_mean"),
        "The standard deviation of an empty selection is NaN: leave it out if nothing is selected",
        "x.std(0) if len(x) > 1 else x.sum() * 0",
        is_empty=True,
    ),
    Fault(
        ("var", "std", "var_mean", "std_mean"),
        "Variance and standard deviation overflow float16: compute them in float32",
        "x.float().var(0)",
        dtypes=_HALF,
        made="inf",
    ),
    Fault(
        ("std", "var", "var_mean", "std_mean"),
        "The standard deviation of one value is NaN (it divides by n - 1). Of a batch of one sample: give "
        "drop_last=True to the DataLoader, or at least two samples; of a dimension of one: leave it out",
        "x.std(0, unbiased=False)",
        made="nan",
    ),
    Fault(
        ("native_layer_norm", "native_group_norm", "native_batch_norm", "_fused_rms_norm"),
        "All values to be normalized are equal and eps is 0: 0/0. Give the layer one, such as eps=1e-5",
        "torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)",
        made="nan",
    ),
)

_LINEAR_ALGEBRA = (
    Fault(
        ("_linalg_solve_ex",),
        "The matrix is singular: add a multiple of the identity",
        "torch.linalg.solve(x + 1e-3 * x.new_ones(x.shape[-1]).diag(), y)",
    ),
    Fault(
        ("linalg_inv_ex", "linalg_solve_triangular"),
        "The matrix is singular: add a multiple of the identity",
        "torch.linalg.inv(x + 1e-3 * x.new_ones(x.shape[-1]).diag())",
    ),
    Fault(
        ("scalar_tensor",),
        "torch.logdet of a matrix whose determinant is negative, or 0 but for rounding, is NaN",
        "torch.linalg.slogdet(x + 1e-3 * x.new_ones(x.shape[-1]).diag())[1]",
        called="logdet",
        argument=None,
        made="nan",
    ),
    Fault(
        ("_linalg_slogdet", "_linalg_det"),
        "The matrix is singular: the logarithm of its determinant is -inf",
        "torch.linalg.slogdet(x + 1e-3 * x.new_ones(x.shape[-1]).diag())",
    ),
)

_OVERFLOWS = (
    Fault(
        _MATMUL,
        "The product of the matrices exceeds 65504, the largest number of float16: use bfloat16, or "
        "compute it in float32",
        "(x.float() @ y.float())",
        argument=None,
        dtypes=_HALF,
    ),
    Fault(
        ("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"),
        "The convolution exceeds 65504, the largest number of float16: use bfloat16, or compute it in "
        "float32",
        "torch.nn.functional.conv1d(x.float(), y.float())",
        argument=None,
        dtypes=_HALF,
    ),
    *(
        Fault(
            operations,
            "The result exceeds 65504, the largest number of float16: accumulate in float32",
            cure,
            argument=None,
            dtypes=_HALF,
        )
        for operations, cure in (
            (("sum", "cumsum"), "x.float().sum(-1)"),
            (("mul",), "x.float() * y"),
            (("add",), "x.float() + y"),
            (("sub",), "x.float() - y"),
        )
    ),
    Fault(
        ("_to_copy", "copy"),
        "A value above 65504 does not fit into float16: stay with float32, use bfloat16, or scale it down "
        "before",
        "x.float()",
        argument=None,
        dtypes=_HALF,
    ),
    *(
        Fault(
            operations,
            "Sums and products of huge numbers overflow float32"
            + ", as do two masks of torch.finfo(dtype).min that are added" * ("add" in operations)
            + ": bound what goes in, or normalize where it is still small",
            cure,
            argument=None,
            beyond=1e6,
        )
        for operations, cure in (
            (_MATMUL, "x.clamp(-1e3, 1e3) @ y.clamp(-1e3, 1e3)"),
            (("convolution",), "torch.nn.functional.conv1d(x.clamp(-1e3, 1e3), y.clamp(-1e3, 1e3))"),
            (("mul",), "(x * y).clamp(-1e6, 1e6)"),
            (("add",), "(x + y).clamp(-1e6, 1e6)"),
            (("sub",), "(x - y).clamp(-1e6, 1e6)"),
            (("sum", "cumsum"), "x.clamp(-1e6, 1e6).sum(-1)"),
        )
    ),
)

#: Of operations that return nonfinite values.
FAULTS = (
    *FUNCTIONS,
    *UNDERFLOW,
    *_LOGARITHMS,
    *_EXPONENTIALS,
    *_DIVISIONS,
    *_POWERS,
    *_TRIGONOMETRY,
    *MASKS,
    *_STATISTICS,
    *LOSSES,
    *_LINEAR_ALGEBRA,
    *_OVERFLOWS,
    *BACKWARD,
)
