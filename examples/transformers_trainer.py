"""transformers: a tiny vision transformer of digits, trained by a Trainer with a callback."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy
from transformers import (
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import sonde
from sonde.analysis import cka, stiffness
from sonde.integrations.transformers import SondeCallback


def main(path: Path) -> None:
    """Train a tiny model on the digits, record it into a path, and read the log."""
    x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
    x = x.float().reshape(-1, 1, 8, 8) / 16
    rows = [{"pixel_values": x[i], "labels": int(y[i])} for i in range(len(x))]
    set_seed(0)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    config.num_labels = 10
    model = ViTForImageClassification(config)
    callback = SondeCallback(
        path,
        probe=sonde.Probe({"pixel_values": x[:60]}, y[:60]),
        loss=lambda outputs, targets: cross_entropy(outputs["logits"], targets),
        overwrite=True,
    )
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments = TrainingArguments(
            output_dir=checkpoints,
            num_train_epochs=5,
            per_device_train_batch_size=32,
            learning_rate=3e-3,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()

    run = sonde.open_run(path)
    first, last = run.activations.layers[0], run.activations.layers[-1]
    similarity = float(cka(run).sel(layer=first, other_layer=last))
    print(f"CKA of {first} and {last}: {similarity:.2f}")
    found = float(stiffness(run, steps=[-1]).cosine_within[0])
    print(f"stiffness within classes: {found:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers"), help="run directory")
    main(parser.parse_args().out)
