"""Trainings of Lightning's `Trainer`, with or without its callback, for the tests of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from sonde.integrations.lightning import SondeCallback

from .trainings import NUM_EXAMPLES, body, data, in_band, smooth_body

quiet = pytest.mark.filterwarnings(
    # Lightning's own way with torch of today; then advice on speed and on what is left out.
    "ignore:.*LeafSpec:FutureWarning",
    "ignore:You defined a `validation_step` but have no",
    "ignore:.*does not have many workers",
    "ignore:.*The number of training batches",
    "ignore:.*Checkpoint directory",
    "ignore:.*callbacks used to create the checkpoint",
)


def order() -> Tensor:
    """The order of the examples, the same in each epoch."""
    return torch.randperm(NUM_EXAMPLES, generator=torch.Generator().manual_seed(0))


class Loader:
    """Batches that go on where a state says."""

    def __init__(self, *, as_tuples: bool = False) -> None:
        self.inputs, self.classes = data()
        self.start = self.position = 0
        self.as_tuples = as_tuples

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        batches = order().split(4)
        start, self.start = self.start, 0
        for position in range(start, len(batches)):
            self.position = (position + 1) % len(batches)
            rows = batches[position]
            batch = {"x": self.inputs[rows], "y": self.classes[rows], "ids": rows + 100}
            yield tuple(batch.values()) if self.as_tuples else batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["position"]


class Module(LightningModule):
    """A module whose training calls it, or only a part of it."""

    def __init__(self, *, smooth: bool = False, calls: str = "itself") -> None:
        super().__init__()
        self.body = smooth_body() if smooth else body()
        self.calls = calls
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.body(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch[:2]
        loss = F.cross_entropy(self(x) if self.calls == "itself" else self.body(x), y)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch["x"]), batch["y"]), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def in_band_callback(path: Path, *, id_key: str | int = "ids", **options: Any) -> SondeCallback:
    return SondeCallback(path, **in_band(id_key, **options))


def train(
    path: Path,
    *callbacks: Callback,
    module: Module | None = None,
    loader: Any = None,
    validate: bool = False,
    resume: Path | None = None,
    half: bool = False,
    **options: Any,
) -> Module:
    if half:  # By its name, Lightning refuses it on the CPU.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    seed_everything(5, verbose=False)
    module = Module() if module is None else module
    trainer = Trainer(
        **{
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": path,
            **options,
        },
        callbacks=list(callbacks),
    )
    trainer.fit(
        module,
        Loader() if loader is None else loader,
        Loader() if validate else None,
        ckpt_path=resume,
        weights_only=True if resume else None,
    )
    return module
