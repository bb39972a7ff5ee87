"""Lightning: a Trainer with a callback that records activations and gradients in band."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sonde
from sonde.analysis import cka, stiffness
from sonde.integrations.lightning import SondeCallback


class Digits(LightningModule):
    """A small classifier of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of digits."""
        return torch.as_tensor(self.net(x))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of (digits, classes, ids)."""
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(path: Path) -> None:
    """Train a small network on the digits, record it into a path, and read the log."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    seed_everything(0, verbose=False)
    loader = DataLoader(TensorDataset(x, y, torch.arange(len(x))), batch_size=64, shuffle=True)
    measures = [
        sonde.Activations(sonde.TRAINING),
        sonde.OutputGradients(sonde.TRAINING),
        sonde.ExampleGradients(sonde.Probe(x[:60], y[:60]), cross_entropy),
        sonde.Scalars(),
    ]
    callback = SondeCallback(
        path, measures=measures, id_key=2, reduction="mean", overwrite=True
    )  # The ids are the third entry of a batch.
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(Digits(), loader)

    run = sonde.open_run(path)
    similarity = float(cka(run).sel(layer="net.0", other_layer="net.2"))
    print(f"CKA of the first and the last layer, in band: {similarity:.2f}")
    found = float(stiffness(run, steps=[-1]).cosine_within[0])
    print(f"stiffness within classes: {found:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning"), help="run directory")
    main(parser.parse_args().out)
