"""The loss of the best constant answer, from the targets of the sampled steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

#: Columns beyond which targets are not pooled by column.
MAX_COLUMNS = 65_536
#: Labels for each class that was seen, below which an entropy is too uncertain.
MIN_PER_CLASS = 10
#: Samples whose labels are of one class by no chance; with fewer, a constant has no known loss.
MIN_ALIKE = 256
#: Smoothing of labels from which on all classes have nearly one label.
MAX_SMOOTHING = 0.99
#: Rows below which a variance or a median is too uncertain.
MIN_ROWS = 16

_ELEMENTWISE: Mapping[str, Callable[..., Tensor]] = {
    "l1_loss": functional.l1_loss,
    "smooth_l1_loss": functional.smooth_l1_loss,
    "huber_loss": functional.huber_loss,
}


class LossBaselines:
    """Sums over the targets of each loss, one for each call within a step.

    Example:
        >>> baselines = LossBaselines()
        >>> target = torch.arange(400) % 4
        >>> answer, _ = baselines.constant("0", "cross_entropy", torch.zeros(400, 4), target, {})
        >>> round(answer.exp().item(), 6)
        4.0
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def constant(
        self, key: str, function: str, answer: Tensor, target: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor] | None:
        """Adds a call's targets; returns the mean losses of the best constant, shape `()`, or `None`.

        Returns:
            Over all targets so far, and over those of this call, with which its loss shares their scatter.
            NaN, on the device, where the targets are too few or all alike; 0 for many labels of one class.
        """
        if options.get("pos_weight") is not None:
            return None
        if function in ("cross_entropy", "nll_loss") and not target.is_floating_point():
            return self._entropy(key, answer, target, options)
        if function == "cross_entropy" and answer.ndim == 2:
            total = self._pooled(key, torch.cat([target.sum(0), target.new_ones(1) * len(target)]))
            p = total[:-1] / total[-1]
            return torch.special.entr(p).sum(), _cross_entropy(target.detach().double().mean(0), p).sum()
        if function == "kl_div":
            return self._divergence(key, target, options) if target.ndim == 2 else None
        if answer.shape != target.shape or len(target) < 2 or options.get("weight") is not None:
            return None
        rows = target.detach().float().reshape(len(target), -1)
        if rows.shape[1] > MAX_COLUMNS:
            return None
        if function == "mse_loss":
            return self._variance(key, rows)
        if function in ("binary_cross_entropy", "binary_cross_entropy_with_logits"):
            total = self._pooled(key, torch.cat([rows.sum(0), rows.new_ones(1) * len(rows)]))
            p, here = (total[:-1] / total[-1]).clamp(0, 1), rows.double().mean(0).clamp(0, 1)
            entropy = (torch.special.entr(p) + torch.special.entr(1 - p)).mean()
            enough = torch.minimum(total[:-1], total[-1] - total[:-1]).sum() >= MIN_PER_CLASS
            entropy = torch.where(enough, entropy, torch.nan)
            loss = (_cross_entropy(here, p) + _cross_entropy(1 - here, 1 - p)).mean()
            return _positive(entropy, loss, ((p == 0) | (p == 1)).all() & (total[-1] >= MIN_ALIKE))
        if function in _ELEMENTWISE and len(rows) >= MIN_ROWS:
            best = rows.median(0).values.expand_as(rows)
            kept = {k: options[k] for k in ("beta", "delta") if k in options}
            loss = _ELEMENTWISE[function](best, rows, **kept)
            return _positive(loss, loss)
        return None

    def state_dict(self) -> dict[str, Tensor]:
        """Returns the sums."""
        return {key: total.cpu() for key, total in self._sums.items()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Continues with saved sums."""
        self._sums = dict(state_dict)

    def _pooled(self, key: str, summand: Tensor) -> Tensor:
        summand = summand.detach().double()
        known = self._sums.get(key)
        if known is not None and known.shape == summand.shape:
            summand = summand + known.to(summand.device)
        self._sums[key] = summand
        return summand

    def _entropy(
        self, key: str, answer: Tensor, target: Tensor, options: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        n_classes = answer.shape[1] if answer.ndim > 1 else len(answer)
        labels, ignored = target.reshape(-1), options.get("ignore_index", -100)
        counts = labels.new_zeros(n_classes)
        counts.scatter_add_(0, labels.clamp(0, n_classes - 1), (labels != ignored).to(counts))
        pooled = self._pooled(key, counts)
        enough = pooled.sum() >= MIN_PER_CLASS * (pooled > 0).sum()
        weights, smoothing = options.get("weight"), float(options.get("label_smoothing", 0.0))
        both = torch.stack([pooled, counts.to(pooled)])
        both = both if weights is None else both * weights.to(pooled)
        p, here = (1 - smoothing) * both / both.sum(1, keepdim=True) + smoothing / n_classes
        entropy = torch.where(enough, torch.special.entr(p).sum(), torch.nan)
        of_sample = labels.numel() / max(len(target), 1)  # pixels of one image are of one class more often
        is_single = ((pooled > 0).sum() == 1) & (pooled.sum() >= MIN_ALIKE * of_sample)
        is_single |= smoothing > MAX_SMOOTHING
        entropy = torch.where(is_single, 0.0, entropy)
        return _positive(entropy, _cross_entropy(here, p).sum(), is_single)

    def _divergence(self, key: str, target: Tensor, options: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns how far rows diverge from their mean: by row for `reduction="batchmean"`, or by element."""
        rows = target.double().exp() if options.get("log_target") else target.double()
        entropies = torch.special.entr(rows).sum().reshape(1)
        total = self._pooled(key, torch.cat([rows.sum(0), entropies, rows.new_ones(1) * len(rows)]))
        mean, entropy = total[:-2] / total[-1], total[-2] / total[-1]
        here = _cross_entropy(rows.mean(0), mean).sum() - entropies[0] / len(rows)
        n = 1 if options.get("reduction") == "batchmean" else target.shape[1]
        return _positive((torch.special.entr(mean).sum() - entropy) / n, here / n)

    def _variance(self, key: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        sums = torch.stack([rows.double().sum(0), rows.double().square().sum(0)]).reshape(-1)
        total = self._pooled(key, torch.cat([sums, sums.new_ones(1) * len(rows)]))
        n = total[-1]
        first, second = total[:-1].reshape(2, -1)
        variance = (second / n - (first / n).square()).clamp(min=0).mean() * n / (n - 1)
        here = (rows.double() - first / n).square().mean() * n / (n - 1)
        return _positive(torch.where(n >= MIN_ROWS, variance, torch.nan), here)


def _cross_entropy(shares: Tensor, p: Tensor) -> Tensor:
    """Returns the cross-entropy of probabilities by class, for the share of each class."""
    entropy: Tensor = -torch.special.xlogy(shares, p)
    return entropy


def _positive(loss: Tensor, here: Tensor, is_single: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns NaN for targets that are all alike, as a constant has no loss then; 0 for many of one class."""
    nothing = (
        torch.full_like(loss, torch.nan) if is_single is None else torch.where(is_single, 0.0, torch.nan)
    )
    return torch.where(loss > 1e-9, loss, nothing), torch.where(loss > 1e-9, here, torch.nan)
