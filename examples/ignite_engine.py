"""Ignite: a supervised trainer with a handler that records in band and on a probe."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from ignite.engine import create_supervised_trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import sonde
from sonde.analysis import stiffness
from sonde.integrations.ignite import SondeHandler


def main(path: Path) -> None:
    """Train a small network on the digits, record it into a path, and read the log."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)

    handler = SondeHandler(
        path, model, optimizer, probe=sonde.Probe(x[:60], y[:60]), overwrite=True
    )
    trainer = create_supervised_trainer(model, optimizer, handler.watch_loss(cross_entropy))
    handler.attach(trainer)
    trainer.run(loader, max_epochs=5)

    found = float(stiffness(sonde.open_run(path), steps=[-1]).cosine_within[0])
    print(f"stiffness within classes: {found:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/ignite"), help="run directory")
    main(parser.parse_args().out)
