"""Trainings under Accelerate, on one process or several; writes what they computed.

Run as `python accelerated.py OUT` or `torchrun … accelerated.py OUT`. 22 examples in batches of 4
leave two processes an uneven last batch; two micro-batches are accumulated in a step.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader

import sonde
from sonde.hooks import Measure
from sonde.integrations.accelerate import attach

NUM_EXAMPLES, BATCH_SIZE, NUM_ACCUMULATED, NUM_EPOCHS = 22, 4, 2, 2


class Net(nn.Module):
    """Dropout draws random numbers, BatchNorm has buffers; ids are nothing it knows of."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(dropout)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.body(x)))


def data() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(NUM_EXAMPLES, 6, generator=torch.Generator().manual_seed(1))
    return inputs, torch.arange(NUM_EXAMPLES) % 3


def measures() -> list[Measure]:
    inputs, targets = data()
    held, sharded = (
        sonde.Probe(inputs[:7], targets[:7], name=name, sharded=name == "sharded")
        for name in ("held", "sharded")
    )
    return [
        sonde.Activations(sonde.TRAINING, store=sonde.Full()),
        sonde.OutputGradients(sonde.TRAINING, store=sonde.Full()),
        sonde.ExampleGradients(sonde.TRAINING, store=sonde.Full()),
        sonde.Activations(held),
        sonde.Activations(sharded),
        sonde.ExampleGradients(held, F.cross_entropy),
        sonde.Scalars(),
    ]


@dataclass(frozen=True)
class How:
    """How a training runs.

    Attributes:
        path: The run directory; None records nothing.
        precision: `no` or `bf16`.
        is_early: Attach before `prepare`, not after it.
        uses_recorder: Attach a recorder that is made already.
        is_shuffled: Draw the order of the examples.
        dropout: How much is dropped. A checkpoint holds the random state, but the loader that is
            started again draws from it, with or without sonde.
        save: Write a checkpoint there, after the first step, in the middle of an epoch.
        stops: Stop after the first epoch.
        load: Go on from a checkpoint.
        logging: Where the user's TensorBoard writes.
    """

    path: Path | None = None
    precision: str = "no"
    is_early: bool = False
    uses_recorder: bool = False
    is_shuffled: bool = True
    dropout: float = 0.3
    save: Path | None = None
    stops: bool = False
    load: Path | None = None
    logging: Path | None = None


SAVED_STEPS = 1


def train(how: How) -> dict[str, str]:
    """Train, and return digests of all that a training changes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    set_seed(0)
    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=NUM_ACCUMULATED,
        mixed_precision=how.precision,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        log_with="tensorboard" if how.logging else None,
        project_dir=how.logging,
    )
    if how.logging:
        accelerator.init_trackers("training")
    inputs, targets = data()
    examples = [
        {"x": x, "y": y, "id": 10 + i} for i, (x, y) in enumerate(zip(inputs, targets, strict=True))
    ]
    model: nn.Module = Net(how.dropout)
    optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader: Any = DataLoader(examples, BATCH_SIZE, shuffle=how.is_shuffled)  # type: ignore[arg-type]  # A list will do.
    recorder = _attach(accelerator, how, model, optimizer) if how.is_early else None
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if not how.is_early:
        recorder = _attach(accelerator, how, model, optimizer)
    if how.load is not None:
        accelerator.load_state(str(how.load))
    num_done = SAVED_STEPS * NUM_ACCUMULATED if how.load is not None else 0
    num_seen = num_done
    for epoch in range(NUM_EPOCHS):
        loader.set_epoch(epoch)
        skips = epoch == 0 and num_done
        for batch in skip_first_batches(loader, num_done) if skips else loader:
            ids = {} if recorder is None else {"id": batch["id"]}
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch["x"], **ids).float(), batch["y"])
                if recorder is not None:
                    recorder.log(loss=loss)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            num_seen += 1
            if num_seen == SAVED_STEPS * NUM_ACCUMULATED and how.save is not None:
                accelerator.save_state(str(how.save))
                accelerator.wait_for_everyone()
        if how.stops:
            break
        if recorder is not None:
            recorder.epoch()
    if recorder is not None:
        recorder.close()
    for tracker in accelerator.trackers:
        tracker.finish()
    return state_of(model, optimizer, accelerator)


def _attach(
    accelerator: Accelerator, how: How, model: nn.Module, optimizer: torch.optim.Optimizer
) -> sonde.Recorder | None:
    if how.path is None:
        return None
    when = sonde.every(1)
    if how.uses_recorder:
        recorder = sonde.Recorder(how.path, model, measures(), when=when)
        return attach(accelerator, recorder, model, optimizer, id_key="id", reduction="mean")
    return attach(
        accelerator,
        how.path,
        model,
        optimizer,
        measures=measures(),
        when=when,
        id_key="id",
        reduction="mean",
        resume=how.load is not None,
    )


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> dict[str, str]:
    """Return a digest of every weight, buffer, moment and random state, and who called hooks."""
    tensors = dict(accelerator.unwrap_model(model).state_dict())
    for at, state in enumerate(optimizer.state.values()):
        for name, value in state.items():
            tensors[f"{at} {name}"] = torch.as_tensor(value)
    tensors["torch random state"] = torch.get_rng_state()
    texts = {name: value.detach().numpy().tobytes() for name, value in tensors.items()}
    texts["numpy random state"] = pickle.dumps(np.random.get_state())
    texts["python random state"] = repr(random.getstate()).encode()
    texts["hooks"] = str(
        [len(accelerator._save_model_state_pre_hook), "backward" in vars(accelerator)]
    ).encode()
    return {name: hashlib.sha256(text).hexdigest()[:12] for name, text in texts.items()}


def main(out: Path) -> None:
    first = Accelerator(cpu=True)
    rank, num_ranks = first.process_index, first.num_processes
    print(f"rank {rank} of {num_ranks}", flush=True)
    trainings = {
        "nothing": How(),
        "late": How(out / "late"),
        "early": How(out / "early", is_early=True),
        "recorder": How(out / "recorder", uses_recorder=True, is_shuffled=False),
        "nothing in order": How(is_shuffled=False),
        "bf16 nothing": How(precision="bf16", save=out / "saved without"),
        "bf16": How(out / "bf16", precision="bf16", logging=out / "logs"),
        "uninterrupted": How(out / "uninterrupted", dropout=0, save=out / "saved"),
        "cut off": How(out / "resumed", dropout=0, save=out / "saved again", stops=True),
        "resumed": How(out / "resumed", dropout=0, load=out / "saved again"),
        "without sonde": How(dropout=0, load=out / "saved again"),
        "without a state": How(out / "without a state", load=out / "saved without"),
    }
    results, warned = {}, {}
    for name, how in trainings.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", sonde.SondeWarning)
            results[name] = train(how)
        warned[name] = [str(w.message) for w in caught if w.category is sonde.SondeWarning]
    (out / f"rank{rank}.json").write_text(json.dumps({"results": results, "warned": warned}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
