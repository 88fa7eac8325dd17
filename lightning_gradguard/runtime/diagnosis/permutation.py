"""The loss with permuted targets, which shows if it depends on them."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from lightning_gradguard.core.snapshots import preserve_state, rng_state, set_rng_state
from lightning_gradguard.runtime import lightning_api
from lightning_gradguard.runtime.incidents.replay import training_loss, without_logging
from lightning_gradguard.runtime.training_step import is_replaced_by_others

#: Permutations of the targets that are averaged.
N_PERMUTATIONS = 3
#: Keys of targets in a batch that is a dictionary.
_TARGET_KEYS = ("labels", "label", "targets", "target", "y")


def target_of(batch: Any) -> Tensor | None:
    """Returns the targets of a batch that is a pair or has a key for them; `None` if unknown."""
    if isinstance(batch, dict):
        found = next((batch[key] for key in _TARGET_KEYS if key in batch), None)
    else:
        found = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) and found.ndim > 0 and len(found) > 1 else None


def inputs_of(batch: Any, target: Tensor | None) -> list[Tensor]:
    """Returns the tensors of a batch that have a row for each target."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf is not target]
    return [leaf for leaf in leaves if target is not None and leaf.ndim > 0 and len(leaf) == len(target)]


def losses_of_permuted(
    trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
) -> Tensor | None:
    """Returns the loss, and the mean loss with permuted targets: alike if they do not depend on each other.

    The shape is `(2,)`; `None` where it cannot be measured, NaN for targets that are all alike. The passes
    leave no trace: weights, buffers, random numbers, attributes and logs are as before.
    """
    target = target_of(batch)
    if target is None or not lightning_api.allows_extra_pass(trainer):
        return None
    if lightning_api.is_compiled(pl_module) or is_replaced_by_others(pl_module):
        return None
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(target), generator=generator) for _ in range(N_PERMUTATIONS)]
    rows = target.reshape(len(target), -1)
    shares = [(rows[order] == rows).all(1).float().mean() for order in orders]
    is_alike = (torch.stack(shares) > 0.95).any()
    weights = [(p, p._version, p.detach().clone()) for p in pl_module.parameters()]
    rng = rng_state()

    def loss(order: Tensor | None) -> Tensor:
        copied = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch)
        if order is not None:
            chosen = target_of(copied)
            assert chosen is not None
            chosen.copy_(target[order])
        set_rng_state(rng)
        return training_loss(pl_module, copied, batch_idx).detach()

    try:
        with ExitStack() as stack:
            for context in (preserve_state(pl_module), without_logging(pl_module), torch.no_grad()):
                stack.enter_context(context)
            stack.enter_context(trainer.precision_plugin.train_step_context())
            plain = loss(None)
            permuted = torch.stack([loss(order) for order in orders]).mean()
    except Exception:  # a step that needs gradients, or a batch that is no pair
        return None
    finally:
        with torch.no_grad():
            for weight, version, saved in weights:
                if weight._version != version:
                    weight.copy_(saved)
    return torch.where(is_alike, torch.nan, torch.stack([plain, permuted]).float())
