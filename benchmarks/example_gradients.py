"""CPU time and memory of per-example gradients, beside plain training and beside peers.

Gram matrices: sonde's `Gram()`, in all and of each layer, beside one forward and backward pass of
the same batch with the gradients of all parameters (plain). Opacus, BackPACK and torch.func form
the gradients of each example; of these the Gram matrix in all is made, parameter by parameter.
Opacus and BackPACK are given copies of the models without operations in place, which their hooks do
not allow. What a contestant finds is held against what torch.func finds.

Full gradients: sonde's `Full()` beside Opacus, of single layers and the sum of their outputs.
Opacus has layers of its own in place of attention and recurrent layers; sonde takes torch's.

All are measured in turn in every round, in an order that rotates, after each has worked once: that
is when sonde checks every parameter of a model. CPU time (user and system) is of all threads of the
process, with torch on one thread; with `--device cuda` it is the time between events. glibc is told
to keep freed memory, for all alike: whether it gives a megabyte back to the system after each call,
and fetches it again, depends on small differences in order, and takes as long as a small layer.
Printed are medians, and the medians of the ratios within a round. Memory is that of a process which
works once (with sonde's check): how much the peak of its resident memory grew, or what CUDA had
allocated, and how much more that is than of plain.

Run `OMP_NUM_THREADS=1 python benchmarks/example_gradients.py` (Linux). The peers are in the
dependency group `bench`; one that is missing or fails gets a row that says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping
from functools import partial

import torch
from gradient_contestants import (
    CONTESTANTS,
    LAYER_CONTESTANTS,
    agreeing,
    func_gram,
)
from gradient_subjects import MODELS, make_layers, make_subject
from peak_memory import MIB, peak_bytes
from rich.console import Console
from rich.table import Table
from turns import (
    PLAIN,
    Case,
    Costs,
    clock_of,
    keep_freed_memory,
    measure,
)

GOALS = {
    "MLP 784-512⁴-10": "1.0×",
    "CNN, 3 convolutions": "1.4×",
    "ResNet-18, GroupNorm": "1.7×",
    "ViT-tiny": "1.4×",
}


def measure_model(name: str, device: torch.device, rounds: int) -> Costs:
    """Measure the Gram matrix of a model."""
    subject = make_subject(name).to(device)
    with func_gram(subject) as work:
        expected = work()
    cases: dict[str, Case] = {PLAIN: partial(CONTESTANTS[PLAIN], subject)}
    for contestant, case in CONTESTANTS.items():
        if contestant != PLAIN:
            cases[contestant] = lambda case=case: agreeing(case(subject), expected)
    return measure(cases, rounds, clock_of(device))


def measure_layers(device: torch.device, rounds: int) -> dict[str, Costs]:
    """Measure the full gradients of each layer."""
    found = {}
    for name, subject in make_layers().items():
        moved = subject.to(device)
        cases = {other: partial(case, moved) for other, case in LAYER_CONTESTANTS.items()}
        found[name] = measure(cases, rounds, clock_of(device))
    return found


def measure_memory(model: str, contestant: str, device: torch.device) -> float:
    """Return by how many MiB the peak of memory grows while a contestant works once."""
    with CONTESTANTS[contestant](make_subject(model).to(device)) as work:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            work()
            return (torch.cuda.max_memory_allocated() - before) / MIB
        before = peak_bytes()
        work()
        return (peak_bytes() - before) / MIB


def memory_apart(model: str, contestant: str, device: torch.device) -> float:
    """Measure memory in a process of its own, unless CUDA counts what is allocated."""
    if device.type == "cuda":
        return measure_memory(model, contestant, device)
    command = [sys.executable, __file__, "--device", str(device), "--memory", model, contestant]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    growth: float = json.loads(result.stdout.splitlines()[-1])
    return growth


def model_rows(name: str, costs: Costs, memory: Mapping[str, float]) -> list[list[str]]:
    """Return the rows of a model."""
    rows = []
    for contestant in costs.seconds:
        over = memory[contestant] - memory[PLAIN]
        goal = f"goal: {GOALS[name]}" if contestant.startswith("sonde") else ""
        rows.append(
            [
                name,
                contestant,
                f"{costs.milliseconds(contestant):.1f}",
                f"{costs.ratio(contestant):.2f}×",
                f"{memory[contestant]:.0f}",
                "" if contestant == PLAIN else f"{over:+.0f}",
                goal,
            ]
        )
    for contestant, reason in costs.failures.items():
        rows.append([name, contestant, "", "", "", "", f"does not run here: {reason}"])
    return rows


def layer_row(name: str, costs: Costs) -> list[str]:
    """Return the row of a layer."""
    row = [name]
    for contestant in LAYER_CONTESTANTS:
        is_there = contestant in costs.seconds
        row.append(f"{costs.milliseconds(contestant):.1f}" if is_there else "")
    if "Opacus" in costs.seconds:
        return [*row, f"{costs.ratio('sonde, Full()', 'Opacus'):.2f}×"]
    return [*row, f"does not run here: {costs.failures['Opacus']}"]


def print_table(console: Console, title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print a table for people, and then as markdown."""
    table = Table(title=title)
    for column in header:
        is_number = any(row[header.index(column)][:1].isdigit() for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    lines = [header, ["---"] * len(header), *rows]
    print(*(f"| {' | '.join(line)} |" for line in lines), "", sep="\n")


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="measured of each")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--no-layers", action="store_true", help="leave out full gradients")
    parser.add_argument(
        "--memory", nargs=2, metavar=("MODEL", "CONTESTANT"), help="only this, as JSON"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    if arguments.memory:
        print(json.dumps(measure_memory(*arguments.memory, device)))
        return
    keep_freed_memory()
    console = Console(width=130)
    rows = []
    for name in arguments.models:
        costs = measure_model(name, device, arguments.rounds)
        memory = {other: memory_apart(name, other, device) for other in costs.seconds}
        rows += model_rows(name, costs, memory)
    if rows:
        header = ["", "", "ms", "to plain", "peak, MiB", "over plain, MiB", " "]
        print_table(console, "Gram matrix of per-example gradients", header, rows)
    if not arguments.no_layers:
        found = measure_layers(device, arguments.rounds)
        header = ["full gradients of", *LAYER_CONTESTANTS, "sonde / Opacus"]
        rows = [layer_row(name, costs) for name, costs in found.items()]
        print_table(console, "Full per-example gradients of 64 examples, ms", header, rows)


if __name__ == "__main__":
    main()
