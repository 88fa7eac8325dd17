"""A GAN on scikit-learn's digits, with manual optimization and two optimizers: both are clipped and guarded.

One batch in fifty is NaN, and by feature matching it reaches the generator's gradients as well as the
discriminator's. The same seed runs bare and guarded. Run it as `python examples/gan.py`; tags of the
discriminator are in the families `grad_norm.0`, `clip.0`, ..., those of the generator in `grad_norm.1`, ...
"""

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss
from torch.utils.data import DataLoader

from lightning_gradguard import default_callbacks


class GAN(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(
            nn.Linear(32, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.BatchNorm1d(128),
            nn.ReLU(),
            nn.Linear(128, 64),
            nn.Sigmoid(),
        )
        self.features = nn.Sequential(
            nn.Linear(64, 128), nn.LeakyReLU(0.2), nn.Linear(128, 128), nn.LeakyReLU(0.2)
        )
        self.head = nn.Linear(128, 1)

    def training_step(self, real: Tensor, batch_idx: int) -> None:
        discriminator_optimizer, generator_optimizer = self.optimizers()  # type: ignore[attr-defined]
        noise = torch.randn(len(real), 32)

        with torch.no_grad():
            fake = self.generator(noise)
        on_real, on_fake = self.head(self.features(real)), self.head(self.features(fake))
        loss = binary_cross_entropy_with_logits(on_real, torch.full_like(on_real, 0.9))
        loss = loss + binary_cross_entropy_with_logits(on_fake, torch.zeros_like(on_fake))
        discriminator_optimizer.zero_grad()
        self.manual_backward(loss)
        discriminator_optimizer.step()

        features = self.features(self.generator(noise))
        on_fake = self.head(features)
        loss = binary_cross_entropy_with_logits(on_fake, torch.ones_like(on_fake))
        feature_matching = mse_loss(features.mean(0), self.features(real).detach().mean(0), reduction="sum")
        generator_optimizer.zero_grad()
        self.manual_backward(loss + feature_matching)
        generator_optimizer.step()

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
        discriminator = [*self.features.parameters(), *self.head.parameters()]
        return (
            torch.optim.Adam(discriminator, lr=2e-3, betas=(0.5, 0.99)),
            torch.optim.Adam(self.generator.parameters(), lr=2e-3, betas=(0.5, 0.99)),
        )


def distance(images: Tensor, others: Tensor) -> float:
    """Fréchet distance of two sets of images, each taken as a normal distribution of its pixels."""
    (mean, covariance), (other_mean, other_covariance) = (
        (x.double().mean(0), x.double().T.cov()) for x in (images, others)
    )
    if not torch.isfinite(other_covariance).all():
        return float("nan")
    product = torch.linalg.eigvals(covariance @ other_covariance).real.clamp(min=0).sqrt().sum()
    spread = covariance.trace() + other_covariance.trace() - 2 * product
    return float((mean - other_mean).square().sum() + spread)


def train(images: Tensor, callbacks: list[pl.Callback], max_steps: int) -> tuple[Tensor, pl.Trainer]:
    """Draw batches, train, and draw as many images as there are real ones."""
    pl.seed_everything(0, verbose=False)
    batches = [images[torch.randint(len(images), (64,))] for _ in range(max_steps)]
    for bad in batches[49::50]:
        bad.fill_(torch.nan)
    module = GAN()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    with torch.no_grad():
        return module.eval().generator(torch.randn(len(images), 32)), trainer


def main(max_steps: int = 500) -> dict[str, float]:
    images = torch.tensor(load_digits().data, dtype=torch.float32) / 16
    bare, _ = train(images, [], max_steps)
    guarded, trainer = train(images, default_callbacks(), max_steps)
    metrics = trainer.callback_metrics
    distances = {
        "noise": distance(images, torch.rand_like(images)),
        "bare": distance(images, bare),
        "guarded": distance(images, guarded),
        "two halves of the real ones": distance(images[::2], images[1::2]),
    }
    print("distance to real digits:", ", ".join(f"{value:.2f} {name}" for name, value in distances.items()))
    print(
        f"{int(metrics['rollback/skips'])} steps of two optimizers skipped; last norms: "
        f"grad_norm.0/total {metrics['grad_norm.0/total']:.2f} (discriminator), "
        f"grad_norm.1/total {metrics['grad_norm.1/total']:.2f} (generator)"
    )
    return distances


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
