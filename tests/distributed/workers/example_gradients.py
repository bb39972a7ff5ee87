"""A training with accumulated gradients on every rank, and the per-example gradients of it.

Run as `torchrun … example_gradients.py OUT`: trains under DDP, and with sharded parameters (FSDP2),
each with and without a recorder, and writes OUT/KIND-RECORDED.pt on rank 0.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import sonde
from sonde.hooks import Measure
from sonde.hooks.gradients.rules.functions import RULES, Rule
from sonde.hooks.gradients.rules.user import gradient_rule

NUM_STEPS, BATCH_SIZE, NUM_ACCUMULATED, NUM_PROBED = 2, 8, 2, 6
KINDS = ("ddp", "fsdp")
RECORDED = ("gram", "full", "probe", "sketched probe", "wrong")


class Scaling(nn.Module):
    """A layer with a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.full((8,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.logarithm.exp()


@gradient_rule(Scaling)
def of_scaling(layer: Scaling, inputs: Tensor, delta: Tensor) -> dict[str, Tensor]:
    return {"logarithm": (delta * inputs).sum(1) * layer.logarithm.detach().exp()}


class Net(nn.Module):
    """Parameters in many places: some need values in the backward pass, one is tied, one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.scaling = Scaling()
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.layer(self.embedding(tokens) + self.position) * self.scale
        x = self.normed(self.recurrent(self.scaling(x))[0])
        return F.linear(x, self.embedding.weight).mean(1)


def data() -> tuple[Tensor, Tensor]:
    num_examples = NUM_STEPS * NUM_ACCUMULATED * BATCH_SIZE
    generator = torch.Generator().manual_seed(1)
    return torch.randint(9, (num_examples, 5), generator=generator), torch.arange(num_examples) % 9


def build(kind: str) -> Any:  # Any: what wraps it has methods of its own.
    torch.manual_seed(0)
    model = Net()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model.layer, model.scaling, model.recurrent, model.normed):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def probe(*, sharded: bool = False) -> sonde.Probe:
    inputs, targets = (tensor[:NUM_PROBED] for tensor in data())
    # Two ranks have batches of 2 and 1, and four ranks have one or two examples each.
    return sonde.Probe(inputs, targets, batch_size=2 if sharded else 4, sharded=sharded)


def measures(recorded: str) -> list[Measure]:
    of_training = sonde.ExampleGradients(sonde.TRAINING)
    made: dict[str, list[Measure]] = {
        "gram": [of_training],
        "full": [sonde.ExampleGradients(sonde.TRAINING, store=sonde.Full(torch.float64))],
        "probe": [sonde.ExampleGradients(probe(), F.cross_entropy)],
        "sketched probe": [
            sonde.ExampleGradients(probe(sharded=True), F.cross_entropy, store=sonde.Sketch(5))
        ],
        "wrong": [of_training, sonde.ExampleGradients(probe(), F.cross_entropy)],
    }
    return made[recorded]


def train(kind: str, path: Path | None, recorded: str) -> dict[str, Any]:
    """Train, and return the weights, the gradients of each step, and the losses."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    model = build(kind)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.01)
    recorder = None
    if path is not None:
        when = sonde.every(1) if recorded != "probe" else sonde.at(0)
        recorder = sonde.Recorder(path, model, measures(recorded), when=when).attach(optimizer)
    inputs, targets = data()
    losses, gradients = [], []
    for number, rows in enumerate(torch.arange(len(inputs)).split(BATCH_SIZE)):
        own = rows.chunk(num_ranks)[rank]
        is_last = number % NUM_ACCUMULATED == NUM_ACCUMULATED - 1
        if kind == "fsdp":
            model.set_requires_gradient_sync(is_last)
        if recorder is not None and recorded == "probe" and number == 3:
            recorder.measure()  # In the middle of the accumulation.
        loss = F.cross_entropy(model(inputs[own]), targets[own])
        if recorder is not None:
            recorder.batch(ids=own, loss=loss)
        with model.no_sync() if kind == "ddp" and not is_last else nullcontext():
            (loss / NUM_ACCUMULATED).backward()
        losses.append(loss.detach())
        if is_last:
            gradients.append([whole(parameter.grad) for parameter in trained])
            optimizer.step()
            optimizer.zero_grad()
    if recorder is not None:
        recorder.close()
    weights = [whole(parameter) for parameter in model.parameters()]
    return {"weights": weights, "gradients": gradients, "losses": losses}


def whole(tensor: Any) -> Tensor:  # Any: a DTensor has a method that a Tensor has not.
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return torch.as_tensor(full.detach().clone())


def doubled(layout: Any, input: Tensor, weight: Tensor, bias: Any = None) -> Any:
    """A rule of linear layers that is wrong for the weight."""
    return RIGHT(layout, input * 2, weight, bias)


RIGHT = RULES[F.linear]


def main(out: Path) -> None:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank} of {num_ranks}", flush=True)
    for kind in KINDS:
        for recorded in ("nothing", *RECORDED):
            path = None if recorded == "nothing" else out / f"{kind} {recorded}"
            RULES[F.linear] = Rule(doubled) if recorded == "wrong" else RIGHT
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", sonde.SondeWarning)
                result = train(kind, path, recorded)
            texts = [str(w.message) for w in caught if w.category is sonde.SondeWarning]
            everything: list[Any] = [None] * num_ranks
            dist.all_gather_object(everything, {**result, "warned": texts})
            if rank == 0:
                torch.save(everything, out / f"{kind} {recorded}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
