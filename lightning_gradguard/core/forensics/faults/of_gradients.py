"""The part of the table for operations whose gradient is nonfinite."""

from __future__ import annotations

from lightning_gradguard.core.forensics.operations import OperationFault as Fault

BACKWARD = (
    Fault(
        ("Div",),
        "The -inf of a mask meets a divisor that is trained: its gradient is 0 times infinity. Divide ahead "
        "of the mask, or mask with a finite number, as in masked_fill(mask, -1e4)",
        "torch.nan_to_num(x, neginf=-1e4) / y",
        phase="backward",
        argument=None,
        is_infinite=True,
    ),
    Fault(
        ("Mul",),
        "The -inf of a mask meets a factor that is trained: its gradient is 0 times infinity. Multiply ahead "
        "of the mask, or mask with a finite number, as in masked_fill(mask, -1e4)",
        "torch.nan_to_num(x, neginf=-1e4) * y",
        phase="backward",
        argument=None,
        is_infinite=True,
    ),
    *(
        Fault(
            names,
            "The gradient exceeds 65504, the largest number of float16: divide the loss by a constant, use "
            "bfloat16, or compute this in float32",
            cure,
            phase="backward",
            argument=None,
            dtypes=("float16",),
            made="inf",
        )
        for names, cure in (
            (("Mm", "Addmm", "Bmm", "Baddbmm", "Mv", "Dot"), "(x.float() @ y.float())"),
            (("Convolution",), "torch.nn.functional.conv1d(x.float(), y.float())"),
            (("Mul",), "x.float() * y"),
            (("ToCopy",), "x.float()"),
        )
    ),
    Fault(
        ("Log", "Log2", "Log10"),
        "The loss is finite, as torch.where, exp or a factor of 0 hides the -inf, but its gradient is 0/0: "
        "replace the argument before the logarithm, too; of a softmax use log_softmax of the scores",
        "torch.log(torch.where(x > 0, x, 1e-30))",
        phase="backward",
        argument=None,
        has_zero=True,
        made="nan",
    ),
    Fault(
        ("Div", "Reciprocal"),
        "The loss is finite, as torch.where or a product with 0 hides the value, but its gradient is 0/0: "
        "replace the divisor before the division, too",
        "x / torch.where(y != 0, y, 1.0)",
        phase="backward",
        argument=None,
        has_zero=True,
        made="nan",
    ),
    Fault(
        ("Sqrt",),
        "The gradient of sqrt at 0 is infinite, and 0/0 where torch.where or a factor of 0 hides the value "
        "(also of a norm that is computed as sqrt of a sum of squares)",
        "torch.sqrt(x + 1e-6)",
        phase="backward",
    ),
    Fault(
        ("LinalgVectorNorm",),
        "The second derivative of a norm at 0 is 0/0",
        "torch.sqrt(x.square().sum(-1, keepdim=True) + 1e-6)",
        phase="backward",
    ),
    Fault(
        ("Pow",),
        "The gradient of a power below 1 is infinite at 0",
        "(x.abs() + 1e-6).pow(y)",
        phase="backward",
        has_zero=True,
        made="inf",
    ),
    Fault(
        ("Pow",),
        "The gradient with respect to the exponent takes the logarithm of the base, which is negative",
        "x.clamp_min(1e-6).pow(y)",
        phase="backward",
        at_most=-1e-45,
        made="nan",
    ),
    Fault(
        ("Acos", "Asin"),
        "The gradient of acos and asin is infinite at -1 and 1, where the value is finite: keep the "
        "argument inside the "
        "open interval",
        "torch.acos(x.clamp(-1 + 1e-6, 1 - 1e-6))",
        phase="backward",
    ),
    Fault(
        ("Acosh",),
        "The gradient of acosh is infinite at 1",
        "torch.acosh(x.clamp_min(1 + 1e-6))",
        phase="backward",
    ),
    Fault(
        ("Log", "Log2", "Log10"),
        "The gradient of the logarithm overflows next to 0",
        "torch.log(x.clamp_min(1e-6))",
        phase="backward",
    ),
    Fault(
        ("Xlogy",),
        "The gradient of xlogy at 0 is infinite, or 0/0, where the value is 0",
        "torch.xlogy(x, y.clamp_min(1e-6))",
        phase="backward",
        argument=None,
    ),
    Fault(
        ("SpecialEntr",),
        "The gradient of entr is infinite at 0, where the value is 0",
        "torch.special.entr(x.clamp_min(1e-6))",
        phase="backward",
    ),
    Fault(
        ("Hypot",),
        "The gradient of hypot is 0/0 at (0, 0)",
        "torch.sqrt(x * x + y * y + 1e-6)",
        phase="backward",
    ),
    Fault(
        ("LinalgSvd",),
        "Singular values are equal: the gradient of their vectors divides by their difference. Use the "
        "values only (torch.linalg.svdvals), or make them differ",
        "torch.linalg.svd(x + torch.eye(*x.shape[-2:]).to(x) * torch.arange(1, x.shape[-1] + 1).to(x) / 100)",
        phase="backward",
    ),
    Fault(
        ("LinalgEigh", "LinalgEig"),
        "Eigenvalues are equal: the gradient of their vectors divides by their difference. Use the values "
        "only (torch.linalg.eigvalsh), or make them differ",
        "torch.linalg.eigh(x + 0.01 * torch.arange(1, x.shape[-1] + 1).to(x).diag())",
        phase="backward",
    ),
    Fault(
        ("LinalgQr", "LinalgSolveEx", "LinalgInvEx", "LinalgCholeskyEx"),
        "The matrix is singular, and its gradient needs the inverse: add a multiple of the identity",
        "torch.linalg.qr(x + 1e-3 * x.new_ones(x.shape[-1]).diag())",
        phase="backward",
    ),
)
