"""The command that records the training in an unedited script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sonde.integrations.launch.run_script import Launch


class Launched(SystemExit):
    """Leaves the command line, for the script to run outside of it.

    Within, its exceptions and its exit would be those of a command.

    Attributes:
        launch: What is to be run.
    """

    def __init__(self, launch: Launch) -> None:
        super().__init__(0)
        self.launch = launch


def run_script(
    script: Annotated[
        list[str],
        typer.Argument(metavar="SCRIPT", help="The script, and its arguments.", show_default=False),
    ],
    module: Annotated[
        bool, typer.Option("--module", "-m", help="SCRIPT is a module, as with python -m.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run directory; default: runs/ and the script's name."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What to record, in YAML.", show_default=False),
    ] = None,
    layers: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Layers to record; may be repeated.", show_default=False),
    ] = None,
    every: Annotated[
        int | None,
        typer.Option(metavar="N", help="Record every N steps; default: log-spaced steps."),
    ] = None,
    examples: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Wait for N examples of the first batches; default: 16 or more."
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="STORE",
            help="Form kept of activations: gram, full or sketch:N; default: gram.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run a training script, unedited, and record its training.

    The script runs as by python: same output, weights and exit code. Its first batches become the
    probe, on which the activations of its model are recorded; where they cannot, the training
    itself is recorded. What is recorded is said in one line on stderr, and so is why, if nothing
    is. It works under torchrun and accelerate launch, too: torchrun -m sonde run train.py. There
    each rank records examples of its own: sonde cka compares layers over all of them where --store
    is full, and rank by rank with its --rank.

    Examples:
        sonde run train.py
        sonde run --out runs/a --every 100 train.py --epochs 2
        sonde run --store full train.py
        sonde run --config sonde.yaml -m project.train
    """
    from sonde.integrations.launch.run_script import Launch, check

    launch = Launch(
        script[0],
        tuple(script[1:]),
        module,
        out,
        config,
        tuple(layers or ()),
        every,
        examples,
        store,
    )
    check(launch)
    _leave(launch)


def _leave(launch: Launch) -> None:
    raise Launched(launch)
