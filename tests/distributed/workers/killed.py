"""A training under DistributedDataParallel in which the last rank is killed after three steps.

Run as `torchrun … killed.py RUN`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import sonde

NUM_STEPS = 3


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    print(f"rank {rank} of {num_ranks}", flush=True)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(40) % 3
    measures = [
        sonde.Activations(sonde.TRAINING, store=sonde.Full()),
        sonde.Activations(sonde.Probe(inputs[:9], sharded=True)),
    ]
    recorder = sonde.Recorder(path, model, measures, when=sonde.every(1)).attach(optimizer)
    for step in range(10):
        own = torch.arange(4 * step, 4 * step + 4).chunk(num_ranks)[rank]
        with recorder.batch(ids=own):
            loss = F.cross_entropy(model(inputs[own]), targets[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 == NUM_STEPS:
            recorder.sync()
            dist.barrier()
            if rank == num_ranks - 1:
                os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
