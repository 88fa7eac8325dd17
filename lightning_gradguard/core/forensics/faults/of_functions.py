"""The part of the table for masks, losses, and functions of torch that consist of several operations."""

from __future__ import annotations

import re

from lightning_gradguard.core.forensics.operations import OperationFault as Fault

_ERRORS = ("mse_loss", "smooth_l1_loss", "huber_loss")
#: Of functions that consist of several operations; their cures replace the function.
FUNCTIONS = (
    Fault(
        ("_softmax",),
        "key_padding_mask, or attn_mask, hides all positions from a query: the softmax of its row is 0/0. "
        "Leave out samples that are all padding, or do not mask them",
        "key_padding_mask & ~key_padding_mask.all(-1, keepdim=True)",
        called="multi_head_attention_forward",
        made="nan",
    ),
    Fault(
        ("sum",),
        "label_smoothing gives a part of the target to every class, also to those that a mask has set to "
        "-inf: leave it out, or mask with a finite number, as in masked_fill(mask, -20)",
        "torch.nn.functional.cross_entropy(x, y)",
        called="cross_entropy",
        made="inf",
    ),
    Fault(
        ("mean",),
        "The loss of an empty selection is a mean of nothing",
        "torch.nn.functional.l1_loss(x, y, reduction='sum') / max(x.numel(), 1)",
        called="l1_loss|kl_div|poisson_nll_loss|gaussian_nll_loss|hinge_embedding_loss|soft_margin_loss"
        "|cosine_embedding_loss|margin_ranking_loss|triplet_margin_loss",
        is_empty=True,
    ),
    Fault(
        ("div",),
        "The temperature tau is 0",
        "torch.nn.functional.gumbel_softmax(x, tau=max(y, 0.1))",
        called="gumbel_softmax",
        number_at_most=0.0,
    ),
    Fault(
        ("div",),
        "A vector is 0, and the eps of normalize is 0 in float16",
        "torch.nn.functional.normalize(x.float(), dim=-1)",
        called="normalize",
        argument=1,
        has_zero=True,
        dtypes=("float16",),
    ),
    Fault(
        ("div",),
        "A vector is 0, and so is the eps of normalize",
        "torch.nn.functional.normalize(x, dim=-1, eps=1e-6)",
        called="normalize",
        argument=1,
        has_zero=True,
    ),
    Fault(
        ("div",),
        "A vector is 0, and so is the eps of cosine_similarity",
        "torch.nn.functional.cosine_similarity(x, y, eps=1e-6)",
        called="cosine_similarity",
        argument=1,
        has_zero=True,
    ),
    Fault(
        ("div",),
        "A row is constant, and its correlations divide by its standard deviation, 0: leave it out, or add a "
        "little noise",
        "torch.corrcoef(x + 1e-3 * torch.randn_like(x))",
        called="corrcoef",
        made="nan",
    ),
    Fault(
        ("div",),
        "The covariance of one sample is NaN (it divides by n - 1). Of a batch of one sample: give "
        "drop_last=True to the DataLoader",
        "torch.cov(x, correction=0)",
        called="cov",
        made="nan",
    ),
    Fault(
        ("div",),
        "All values are NaN, and their mean divides by their count, 0",
        "x.nansum(-1) / (~x.isnan()).sum(-1).clamp_min(1)",
        called="nanmean",
        made="nan",
    ),
    Fault(
        ("rsqrt",),
        "All values of a row are 0, and so is the eps of rms_norm",
        "torch.nn.functional.rms_norm(x, y, eps=1e-6)",
        called="rms_norm",
        has_zero=True,
    ),
    Fault(
        ("exp",),
        "The rate, exp of the answer, overflows float32: bound its logarithm",
        "torch.nn.functional.poisson_nll_loss(x.clamp(max=20), y)",
        called="poisson_nll_loss",
        at_least=20.0,
    ),
    Fault(
        ("div",),
        "Probabilities are 0 throughout a row",
        "torch.distributions.Categorical(probs=x + 1e-6)",
        called="Categorical|OneHotCategorical|Multinomial|RelaxedOneHotCategorical",
        made="nan",
    ),
    Fault(
        ("log",),
        "A rate is negative, whose logarithm the loss takes: make it positive, or give its logarithm, with "
        "log_input=True",
        "torch.nn.functional.poisson_nll_loss(torch.nn.functional.softplus(x), y, log_input=False)",
        called="poisson_nll_loss",
        at_most=-1e-45,
    ),
    Fault(
        ("xlogy",),
        "Targets are negative, as log-probabilities are, and the loss takes their logarithm: give "
        "log_target=True",
        "torch.nn.functional.kl_div(x, y, log_target=True)",
        called="kl_div",
        at_most=-1e-45,
    ),
    Fault(
        ("atanh", "log", "log1p", "logit"),
        "A value at the bound of what the distribution can give, -1 or 1 after a tanh, is at infinity ahead "
        "of its transform: give log_prob values inside",
        "y.clamp(-1 + 1e-6, 1 - 1e-6)",
        called="TransformedDistribution|TanhTransform",
    ),
    Fault(
        ("xlogy",),
        "A target at the bound of the distribution, 0 or 1, has an infinite density: keep targets inside",
        "y.clamp(1e-6, 1 - 1e-6)",
        called="Beta",
        argument=1,
        has_zero=True,
    ),
    Fault(
        ("xlogy",),
        "A target with a part of 0 has an infinite density: keep the parts above 0, with a sum of 1",
        "y.clamp_min(1e-6) / y.clamp_min(1e-6).sum(-1, keepdim=True)",
        called="Dirichlet",
        argument=1,
        has_zero=True,
    ),
    Fault(
        ("xlogy",),
        "A target of 0 has an infinite density: keep targets above 0",
        "y.clamp_min(1e-6)",
        called="Gamma|InverseGamma|Chi2",
        argument=1,
        has_zero=True,
    ),
    Fault(
        ("_weight_norm_interface",),
        "A row of a weight is 0 throughout, and weight_norm divides by its norm: initialize the direction "
        "(parametrizations.weight.original1) otherwise. To begin with outputs of 0, set the lengths, "
        "original0, to 0",
        "torch.nn.init.normal_(x, std=0.05)",
        called="_WeightNorm|WeightNorm",
        made="nan",
    ),
    Fault(
        ("div",),
        "The weight is 0 throughout, and spectral_norm divides by its largest singular value: initialize it "
        "otherwise, before spectral_norm is applied. To begin with outputs of 0, multiply them by a trained "
        "factor of 0",
        "torch.nn.init.orthogonal_(x)",
        called="_SpectralNorm|SpectralNorm",
        argument=1,
        has_zero=True,
    ),
    Fault(
        ("div", "pow", "mul", "reciprocal", "log"),
        "The scale of the distribution is so small that its square, inverse or logarithm leaves the range of "
        "the dtype: bound it",
        "torch.distributions.Normal(x, y.clamp_min(1e-3))",
        called="Normal|LogNormal|Laplace|Cauchy|HalfNormal|StudentT|Gumbel|MultivariateNormal|kl_divergence",
        argument=None,
        has_zero=True,
    ),
)

#: Of losses that are one operation.
LOSSES = (
    Fault(
        (*_ERRORS, "soft_margin_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits"),
        "The loss of an empty selection is a mean of nothing",
        "torch.nn.functional.mse_loss(x, y, reduction='sum') / max(x.numel(), 1)",
        is_empty=True,
    ),
    Fault(
        _ERRORS,
        "The square of the error exceeds 65504, the largest number of float16: compute the loss in float32",
        "torch.nn.functional.mse_loss(x.float(), y.float())",
        argument=None,
        dtypes=("float16",),
        made="inf",
    ),
    Fault(
        _ERRORS,
        "The square of the error overflows float32: answers, or targets, are huge",
        "torch.nn.functional.mse_loss(x.clamp(-1e3, 1e3), y.clamp(-1e3, 1e3))",
        argument=None,
        made="inf",
    ),
    Fault(
        ("nll_loss_forward", "nll_loss2d_forward", "gather", "index"),
        "The class of the target is masked: its score is -inf, and so is its log-probability. Leave out such "
        "samples, or mask with a finite number",
        "torch.nn.functional.cross_entropy(torch.nan_to_num(x, neginf=-1e4), y)",
        made="inf",
    ),
    Fault(
        ("_ctc_loss", "_cudnn_ctc_loss"),
        "A target is longer than its input (each pair of equal neighbours needs one frame more): leave "
        "out such "
        "samples, comparing target_lengths with input_lengths after subsampling, or ignore them with "
        "CTCLoss(zero_infinity=True)",
        "torch.nn.functional.ctc_loss(x, *y, zero_infinity=True)",
        made="inf",
        cause="bad_input",
    ),
    Fault(
        ("nll_loss_forward", "nll_loss2d_forward"),
        "The loss is a mean of nothing: no sample is left, all labels are ignored (ignore_index), or their "
        "class weights are 0",
        "torch.nn.functional.cross_entropy(x, y, reduction='sum') / (y != -100).sum().clamp_min(1)",
        made="nan",
    ),
    Fault(
        ("binary_cross_entropy_with_logits", "binary_cross_entropy"),
        "A target is not finite, or beyond 0..1",
        "torch.nn.functional.binary_cross_entropy_with_logits("
        "x, torch.nan_to_num(y, posinf=1.0, neginf=0.0).clamp(0, 1))",
        argument=None,
    ),
)

#: Of the -inf of a mask that meets another value than a finite score.
MASKS = (
    Fault(
        ("mul",),
        "0 times the -inf of a mask is NaN: mask with a finite number, as in masked_fill(mask, -1e4)",
        "torch.nan_to_num(x, neginf=-1e4) * torch.nan_to_num(y, neginf=-1e4)",
        argument=None,
        has_zero=True,
        made="nan",
    ),
    Fault(
        ("sub", "add"),
        "The infinity of a mask is subtracted from another (inf - inf): mask with a finite number, as in "
        "masked_fill(mask, -1e4)",
        "torch.nan_to_num(x, neginf=-1e4) - torch.nan_to_num(y, neginf=-1e4)",
        argument=None,
        made="nan",
    ),
    *(
        Fault(
            (name,),
            "The infinity of a mask is among the values: leave it out, or mask with a finite number",
            f"torch.nan_to_num(x, posinf=1e4, neginf=-1e4).{name}(-1)",
            is_infinite=True,
            made="inf",
        )
        for name in ("mean", "sum")
    ),
    Fault(
        ("min", "max", "amin", "amax"),
        "A row is masked throughout, its smallest or largest value the infinity of the mask: leave it out, "
        "or mask with a finite number",
        "torch.amin(torch.nan_to_num(x, posinf=1e4, neginf=-1e4), -1)",
        made="inf",
    ),
)

_LOG = ("log", "log2", "log10")
_UNDERFLOW = (
    (
        ("prod", "cumprod"),
        "The product of the factors `x` underflows to 0, and the logarithm of 0 is -inf: add their "
        "logarithms",
        "torch.log(x).sum(-1)",
    ),
    (
        ("exp",),
        "exp(x) underflows to 0 below -103, and the logarithm of 0 (or of a sum of zeros) is -inf: stay with "
        "`x`, to which the logarithms of factors are added",
        "torch.logsumexp(x, -1)",
    ),
    (
        ("1 / exp",),
        "exp(x) overflows above 88, so that 1 divided by it, or by a sum with it, is 0, and the logarithm of "
        "0 is -inf: take both at once",
        "-torch.nn.functional.softplus(x)",
    ),
    (
        ("sigmoid",),
        "sigmoid(x) underflows to 0, and the logarithm of 0 is -inf: take both at once",
        "torch.nn.functional.logsigmoid(x)",
    ),
    (
        ("1 - sigmoid",),
        "1 - sigmoid(x) is 0 where sigmoid(x) rounds to 1, and the logarithm of 0 is -inf: take both at once",
        "torch.nn.functional.logsigmoid(-x)",
    ),
    (
        ("softmax",),
        "softmax(x) underflows to 0, and the logarithm of 0 is -inf: take both at once",
        "torch.log_softmax(x, -1)",
    ),
    (
        ("mul",),
        "The product of `x` and `y` underflows to 0, and the logarithm of 0 is -inf: add logarithms, or, in "
        "a recursion, divide by the sum after each step and add the logarithms of these sums",
        "torch.log(x) + torch.log(y)",
    ),
)
_DIVISOR = (
    "exp(x) underflows to 0 below -103, and is divided by: keep its argument above -15 (divide it by a "
    "larger temperature or regularization), or stay with logarithms"
)
_ROOT = "The divisor is a root of 0, whose gradient is infinite, too: a bound after the root does not help"
#: Of logarithms whose argument is 0 as an operation before them underflows, or whose gradient overflows then.
UNDERFLOW = (
    *(Fault(_LOG, why, cure, underflow=names) for names, why, cure in _UNDERFLOW),
    *(
        Fault(("Log", "Log2", "Log10"), why, cure, phase="backward", argument=None, underflow=names)
        for names, why, cure in _UNDERFLOW
        if not re.search("sigmoid|/", names[0])  # which is 0 where its logarithm's gradient would overflow
    ),
    Fault(("div", "true_divide"), _DIVISOR, "torch.exp(x.clamp_min(-15))", argument=1, underflow=("exp",)),
    Fault(("reciprocal",), _DIVISOR, "torch.exp(x.clamp_min(-15))", underflow=("exp",)),
    Fault(
        ("Div",), _DIVISOR, "torch.exp(x.clamp_min(-15))", phase="backward", argument=None, underflow=("exp",)
    ),
    *(
        Fault(names, _ROOT, cure, argument=argument, underflow=(root,))
        for names, argument in ((("div", "true_divide"), 1), (("reciprocal",), 0))
        for root, cure in (("sqrt", "torch.sqrt(x + 1e-6)"), ("pow", "(x.abs() + 1e-6).pow(y)"))
    ),
)
