"""Tags are recognized by their meaning."""

from __future__ import annotations

import pytest

from lightning_gradguard.core.tags import meaning_of


@pytest.mark.parametrize(
    ("tag", "role", "name"),
    [
        ("grad_norm/total", "total", ""),
        ("grad_norm/body.0.weight", "layer", "body.0.weight"),
        ("grad_norm/log2", "layer", "log2"),
        ("grad_norm/x.log10", "layer", "x.log10"),
        ("summary/largest_norm", "largest", ""),
        ("summary/largest_logged_norm", "largest", ""),
        ("grad_norm.1/total", "total", ""),
        ("grad_norm/nonfinite_fraction", "nonfinite_fraction", ""),
        ("update_ratio/head", "ratio", "head"),
        ("lr_backoff/lr/0", "rate", "0"),
        ("grad_2.0_norm_total", "total", ""),
        ("grad_2.0_norm_total_step", "total", ""),
        ("grad_2.0_norm/net.0.weight", "layer", "net.0.weight"),
        ("grad_inf_norm/net.0.weight_step", "layer", "net.0.weight"),
        ("train/grad_norm", "total", ""),
        ("grad_norm", "total", ""),
        ("gradient_norm", "total", ""),
        ("global_grad_norm", "total", ""),
        ("l2_norm/grad/global", "total", ""),
        ("l2_norm/grad/net.0.weight", "layer", "net.0.weight"),
        ("l2_norm/param/net.0.weight", "weight", "net.0.weight"),
        ("train_loss", "loss", ""),
        ("train/loss", "loss", ""),
        ("loss", "loss", ""),
        ("Loss/train", "loss", ""),
        ("d_loss", "loss", ""),
    ],
)
def test_meaning_of_tags_of_this_package_and_of_others(tag: str, role: str, name: str) -> None:
    meaning = meaning_of(tag)
    assert meaning is not None
    assert (meaning.role, meaning.name) == (role, name)


@pytest.mark.parametrize(
    "tag",
    [
        "log10/grad_norm/total",
        "grad_norm_log10/total",
        "log2/grad_norm/total",
        "grad_norm_band/low",
        "grad_norm_band/total",
        "grad_norm_band.1/high",
        "log10/grad_norm_band/total",
        "summary/incidents",
        "summary/final_loss",
        "log10/train_loss",
        "val_loss",
        "eval/loss",
        "l2_norm/moment/net.0.weight",
        "lr_backoff/scheduled_lr/0",
        "epoch",
    ],
)
def test_other_tags_have_no_meaning(tag: str) -> None:
    assert meaning_of(tag) is None
