"""A training on every rank of a process group, or on one process; writes what it computed.

Run as `torchrun … parallel.py OUT`: trains a model under DDP, and with sharded parameters (FSDP2),
each with and without a recorder, and writes OUT/KIND-RECORDED.pt on rank 0.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sonde
from sonde.hooks import Measure, Store
from sonde.hooks.model.layers import unwrap

NUM_STEPS, BATCH_SIZE, NUM_EXAMPLES, NUM_PROBED = 3, 8, 24, 21
STORES: dict[str, Store] = {
    "gram": sonde.Gram(),
    "sketch": sonde.Sketch(6),
    "full": sonde.Full(),
    "blocks": sonde.Gram(block=4),
}
KINDS = ("ddp", "fsdp")


class Net(nn.Module):
    """Its second part sees time first, so that the batch axis is not the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, padding=1)
        self.drop = nn.Dropout(0.2)
        self.mix = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.drop(self.conv(x).relu()).permute(2, 0, 1)
        return torch.as_tensor(self.head(self.norm(self.mix(features)).tanh().mean(0)))


def data() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(NUM_EXAMPLES, 2, 7, generator=torch.Generator().manual_seed(1))
    return inputs, torch.arange(NUM_EXAMPLES) % 5


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Net()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model.conv, model.mix, model.head):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def probe_measures() -> Iterator[Measure]:
    """What is recorded on probes: each store, sharded or not; 21 examples leave no rank the same.

    With two ranks and batches of 5 one runs two batches and the other three.
    """
    inputs, targets = (tensor[:NUM_PROBED] for tensor in data())
    for is_sharded in (False, True):
        for name, store in STORES.items():
            probe = sonde.Probe(
                inputs,
                targets,
                ids=range(100, 100 + NUM_PROBED),
                name=f"{name}{' sharded' * is_sharded}",
                batch_size=5,
                sharded=is_sharded,
            )
            # So little memory that a layer is held at a time.
            yield sonde.Activations(probe, store=store, memory=2000)
            yield sonde.Predictions(probe)


def live_measures() -> list[Measure]:
    full = sonde.Full()
    return [
        sonde.Activations(sonde.TRAINING, store=full),
        sonde.OutputGradients(sonde.TRAINING, store=full),
        sonde.ExampleGradients(sonde.TRAINING, store=full),
    ]


def train(kind: str, path: Path | None, measures: list[Measure]) -> dict[str, Any]:
    """Train, and return the weights, the gradients of each step, and the losses."""
    is_alone = kind == "one process"
    rank, num_ranks = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    model = build(kind)
    torch.manual_seed(rank)  # Dropout differs between ranks.
    if is_alone:
        model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    recorder = None
    if path is not None:
        recorder = sonde.Recorder(path, model, measures, when=sonde.every(1)).attach(optimizer)
    inputs, targets = data()
    losses, gradients = [], []
    for rows in torch.arange(NUM_EXAMPLES).split(BATCH_SIZE):
        own = rows.chunk(num_ranks)[rank]
        loss = F.cross_entropy(model(inputs[own]), targets[own])
        if recorder is not None:
            recorder.batch(ids=own, targets=targets[own], loss=loss)
        optimizer.zero_grad()
        loss.backward()
        gradients.append([whole(p.grad) for p in model.parameters()])
        optimizer.step()
        losses.append(loss.detach())
    if recorder is not None:
        recorder.close()
    weights = [whole(parameter) for parameter in model.parameters()]
    return {"weights": weights, "gradients": gradients, "losses": losses}


def whole(tensor: Any) -> Tensor:  # Any: a DTensor has a method that a Tensor has not.
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return torch.as_tensor(full.detach().clone())


def problems(out: Path) -> dict[str, list[str]]:
    """What this rank is told of other probes on each rank, and of a failure on the last one."""
    rank, inputs = dist.get_rank(), data()[0]
    told: dict[str, list[str]] = {}
    model = build("ddp")
    other = sonde.Activations(sonde.Probe(inputs[: 8 + rank], sharded=True))
    try:
        sonde.Recorder(out / "refused", model, [other])
    except sonde.SondeError as error:
        told["refused"] = [f"{type(error).__name__}: {error}"]
    measures = [
        sonde.Activations(sonde.Probe(inputs[:8], sharded=True, name="a"), ["head"]),
        sonde.Predictions(sonde.Probe(inputs[:8], sharded=True, name="b")),
    ]
    recorder = sonde.Recorder(out / "failing", model, measures)

    def fail(module: nn.Module, _: Any) -> None:
        if rank == dist.get_world_size() - 1:
            raise RuntimeError("out of memory")

    unwrap(model).register_forward_pre_hook(fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder.measure()
        recorder.measure()
    told["failing"] = [str(warning.message) for warning in caught]
    recorder.close()
    return told


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank} of {num_ranks}", flush=True)
    recorded: dict[str, list[Measure]] = {
        "nothing": [],
        "probes": list(probe_measures()),
        "training": live_measures(),
    }
    for kind in KINDS:
        for name, measures in recorded.items():
            path = out / f"{kind} {name}" if measures else None
            result = train(kind, path, measures)
            everything: list[Any] = [None] * num_ranks
            dist.all_gather_object(everything, result)
            if rank == 0:
                torch.save(everything, out / f"{kind} {name}.pt")
    (out / f"problems{rank}.json").write_text(json.dumps(problems(out)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
