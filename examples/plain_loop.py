"""A plain loop: one line attaches a recorder; then CKA between two layers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import sonde
from sonde.analysis import cka


def main(path: Path) -> None:
    """Train a small network on the digits, record it into a path, and read the log."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = x.float() / 16
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    probe = sonde.Probe(x[:100], y[:100])
    recorder = sonde.attach(model, optimizer, path, probe=probe, overwrite=True)
    for batch in torch.randperm(5 * len(x)).remainder(len(x)).split(64):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[batch]), y[batch])
        recorder.log(loss=loss)
        loss.backward()
        optimizer.step()
    recorder.close()

    similarity = cka(sonde.open_run(path))
    print(f"CKA of the first and the last layer: {similarity.sel(layer='0', other_layer='2'):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/plain_loop"), help="run directory")
    main(parser.parse_args().out)
