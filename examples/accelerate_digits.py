"""Learn scikit-learn's bundled digits under Accelerate, on one process or several, and record it.

Run `python examples/accelerate_digits.py`, or on two processes
`torchrun --standalone --nproc_per_node 2 examples/accelerate_digits.py`. Every process records the
examples it trains on; the probe is divided between them, and recorded as one.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sonde
from sonde.analysis import cka
from sonde.integrations.accelerate import attach

NUM_PROBE = 200


def train(accelerator: Accelerator, path: Path, num_epochs: int) -> None:
    """Train a small network; all that is new is one line."""
    images, classes = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    examples: Any = [
        {"x": x, "y": y, "id": i} for i, (x, y) in enumerate(zip(images, classes, strict=True))
    ]
    loader: Any = DataLoader(examples, batch_size=64, shuffle=True)
    model: nn.Module = Classifier()
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    probe = sonde.Probe(images[:NUM_PROBE], classes[:NUM_PROBE], sharded=True)
    measures = [
        sonde.Activations(probe),
        sonde.Activations(sonde.TRAINING, store=sonde.Full()),
        sonde.Scalars(),
    ]
    recorder = attach(
        accelerator, path, model, optimizer, measures=measures, id_key="id", overwrite=True
    )
    for _ in range(num_epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch["x"], id=batch["id"]), batch["y"])
                recorder.log(loss=loss)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    recorder.close()


class Classifier(nn.Module):
    """A perceptron; that a call brings ids, it need not know."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [examples, 10]."""
        return torch.as_tensor(self.head(self.hidden(x)))


def show(path: Path) -> None:
    """Print what was recorded, and how far each layer still was from what it became."""
    run = sonde.open_run(path)
    live = run["activations", "training"]
    for step in live.steps[:2]:
        ids = live.ids_at(step)
        assert ids is not None
        print(f"step {step}: {len(ids)} examples, of processes {live.ranks_at(step)}")
    similarity = cka(run, step=0, other_step=-1, source="probe")
    print(similarity.round(2).to_pandas())


def main() -> None:
    """Train, then read the log on the main process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate"))
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator(cpu=True)
    print(f"rank {accelerator.process_index} of {accelerator.num_processes}", flush=True)
    train(accelerator, options.out, options.epochs)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        show(options.out)
    accelerator.end_training()


if __name__ == "__main__":
    main()
