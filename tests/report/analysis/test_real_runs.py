"""Trained runs get the diagnosis of an expert."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_gradguard import AdaptiveGradientClipping, GradientNormMonitor, default_callbacks
from lightning_gradguard.cli.demo_task import CharacterRNN, Characters
from tests.report.runs import printed, report_of, train, write_events
from tests.tasks import Batch, Classifier, clusters, poisoned

NAN = math.nan
WORDS = ("Clip gradients", "initialization", "gated cells", "LSTM", "GRU")


class Deep(pl.LightningModule):
    """Twelve layers whose gradients depend on activation and initialization."""

    def __init__(
        self, activation: Callable[[], nn.Module], initialize: Callable[[Tensor], Tensor] | None
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        sizes = [64] * 13
        layers = [m for a, b in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(a, b), activation())]
        self.net = nn.Sequential(*layers, nn.Linear(64, 10))
        for layer in self.net:
            if initialize is not None and isinstance(layer, nn.Linear):
                initialize(layer.weight)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.02)


class LSTM(pl.LightningModule):
    """A gated recurrent network on characters."""

    def __init__(self, n_characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_characters, 32)
        self.rnn = nn.LSTM(32, 64, batch_first=True)
        self.head = nn.Linear(64, n_characters)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        states, _ = self.rnn(self.embedding(batch[0]))
        loss = nn.functional.cross_entropy(self.head(states).transpose(1, 2), batch[1])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=5.0)


def digits(n: int) -> list[Batch]:
    inputs, target = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randint(len(inputs), (64,), generator=generator) for _ in range(n)]
    x, y = torch.tensor(inputs / 16, dtype=torch.float32), torch.tensor(target)
    return [(x[i], y[i]) for i in chosen]


def he(weight: Tensor) -> Tensor:
    return nn.init.kaiming_normal_(weight, nonlinearity="relu")


def test_exploding_gradients() -> None:
    data = Characters(n_batches=8)
    module = CharacterRNN(len(data.alphabet))
    found = report_of(train(module, [], [GradientNormMonitor()], loader=data.train_dataloader()))
    assert (found.verdict.status, found.verdict.headline) == ("failed", "exploding gradients")
    assert found.worst_layer == "rnn.weight_hh_l0"
    assert found.verdict.outcome.survived == 3
    remedies = " ".join(found.verdict.symptoms[0].remedies)
    assert all(word in remedies for word in WORDS)


def test_vanishing_gradients() -> None:
    found = report_of(train(Deep(nn.Sigmoid, None), digits(60), [GradientNormMonitor()]))
    assert (found.verdict.status, found.verdict.headline) == ("unhealthy", "vanishing gradients")
    assert found.worst_layer == "net.0"
    assert "He initialization" in found.verdict.symptoms[0].remedies[0]


def test_explosion_from_the_first_step() -> None:
    module = Deep(nn.ReLU, lambda weight: nn.init.normal_(weight, std=0.4))
    found = report_of(train(module, digits(10), [GradientNormMonitor()]))
    assert found.verdict.headline == "exploding gradients"


def test_nonfinite_batch_without_callbacks() -> None:
    found = report_of(train(Classifier(), poisoned(clusters(40), nan=[30]), [GradientNormMonitor()]))
    assert (found.verdict.status, found.verdict.headline) == ("failed", "nonfinite loss")
    assert found.verdict.outcome.failed_at == 30
    assert "NaNRollback" in " ".join(found.verdict.symptoms[0].remedies)


def test_nonfinite_batch_that_was_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    path = train(Classifier(), poisoned(clusters(60), nan=[30, 31]), default_callbacks())
    found = report_of(path)
    assert (found.verdict.status, found.verdict.headline) == (
        "recovered",
        "recovered from nonfinite loss (cause: bad input)",
    )
    assert (found.interventions.skips, found.interventions.rollbacks) == (2, 0)
    assert dict(found.interventions.lost_batches) == {"skipped": 2}
    assert found.run.dossiers[0].cause == "bad_input"
    assert (path / found.run.dossiers[0].path).is_file()
    text = printed(capsys, "run")
    assert "2 steps skipped, 0 rollbacks" in text
    assert "steps 30 to 31  Nonfinite loss (2 times), skipped" in text
    assert "cause: bad input" in text or "cause of 1: bad input" in text
    # callbacks already in place are not advised again
    assert "NaNRollback()" not in text.partition("Next steps")[2].partition("Timeline")[0]


def test_stuck_loss() -> None:
    module = Deep(nn.ReLU, lambda weight: nn.init.normal_(weight, std=0.01))
    found = report_of(train(module, digits(110), [GradientNormMonitor()]))
    assert found.verdict.status == "unhealthy"
    assert "stuck_loss" in {symptom.kind for symptom in found.verdict.symptoms}


def test_healthy_mlp() -> None:
    callbacks = [GradientNormMonitor(), AdaptiveGradientClipping()]
    found = report_of(train(Deep(nn.ReLU, he), digits(150), callbacks))
    assert (found.verdict.status, found.worst_layer) == ("healthy", "")
    # the norm is 4, and the policy allows 1
    assert {symptom.kind for symptom in found.verdict.symptoms} <= {"constant_clipping"}


def test_healthy_lstm() -> None:
    data = Characters(n_batches=40)
    module = LSTM(len(data.alphabet))
    found = report_of(train(module, [], [GradientNormMonitor()], loader=data.train_dataloader()))
    assert (found.verdict.status, found.verdict.symptoms) == ("healthy", ())


@pytest.mark.parametrize("family", ["grad_2.0_norm", "l2_norm/grad"])
def test_logs_of_other_tools_are_diagnosed(family: str) -> None:
    total = f"{family}_total" if family.startswith("grad") else f"{family}/global"
    norms = [1.0, 1.3, 700.0, 2e7, NAN]
    tags = {
        total: norms,
        f"{family}/rnn.weight_hh_l0": norms,
        f"{family}/head.weight": [1.0, 1.0, 1.0, 9.0, NAN],
    }
    found = report_of(write_events("run", {**tags, "train/loss": [4.0, 3.9, 4.1, 90.0, NAN]}))
    assert found.verdict.headline == "exploding gradients"
    assert found.worst_layer == "rnn.weight_hh_l0"
    assert found.interventions.skips is None
