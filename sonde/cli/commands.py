"""The command line: record trainings, look at recorded runs and analyze them, without torch.

A command parses its options, calls one function of `sonde.analysis` or `sonde.log`, and prints the
result; whatever is heavy to import is imported in its body.
"""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sonde.exceptions import InvalidInputError, RunNotFoundError

from .analyses import boundary, stiffness
from .components import components
from .console import Group, help_of, say, working
from .export import export
from .families import choose, config_columns, print_groups, sweep
from .options import Json, RunPath, RunPaths, Where, open_all, use_no_window
from .run import Launched, run_script
from .show import print_overviews, print_run
from .similarity import blocks, cka

app = typer.Typer(
    cls=Group,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line; the entry point of the program `sonde`."""
    streams = [s for s in (sys.stdout, sys.stderr) if isinstance(s, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    hook = sys.excepthook
    for stream in streams:
        # Where × or – cannot be written, a question mark is better than a traceback.
        stream.reconfigure(errors="replace")
    try:
        app(prog_name="sonde")
    except Launched as launched:
        launch = launched.launch
    # Out here nothing of the command line is left that could change how the script runs and ends.
    for stream, errors in zip(streams, before, strict=True):
        stream.reconfigure(errors=errors)
    sys.excepthook = hook
    from sonde.integrations.launch import run_script as launcher

    launcher.run(launch)


def _print_version(wanted: bool) -> None:
    if wanted:
        from sonde import __version__

        typer.echo(f"sonde {__version__}")
        raise typer.Exit


@app.callback()
def sonde(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Look at recorded trainings and analyze them."""


def ls(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="PATH", help="Folders to search, or exported runs; default: this folder."
        ),
    ] = None,
    config: Annotated[
        bool, typer.Option("--config", help="Show the configuration of each run.")
    ] = False,
    by: Annotated[
        str | None,
        typer.Option(metavar="KEY,KEY", help="One row per value of these configuration keys."),
    ] = None,
    where: Where = None,
    as_json: Json = False,
) -> None:
    """List the runs at or below folders.

    One row per run directory, and per exported run that is named: its state, the steps and measures
    it recorded, its size on disk, and how long ago it was written. --config shows what tells runs
    apart, --by groups them by it.

    Examples:
        sonde ls
        sonde ls runs
        sonde ls runs --config --where width=32,64
        sonde ls runs --by width,noise
        sonde ls runs --json
    """
    from sonde.log.format.files import find_runs

    from .facts import overview

    roots = paths or [Path()]
    _check_existence(roots)
    runs = ([root] if root.is_file() else find_runs(root) for root in roots)
    found = list(dict.fromkeys(run for at_root in runs for run in at_root))
    with working("reading", total=len(found)) as start:
        overviews = []
        for path in found:
            start(str(path))
            overviews.append(overview(path))
    overviews = choose(overviews, where)
    if as_json:
        typer.echo(json.dumps(overviews, indent=1))
    elif overviews and by is not None:
        print_groups(overviews, [key.strip() for key in by.split(",")])
    elif overviews:
        print_overviews(overviews, config_columns(overviews) if config else {})
    elif where:
        say(f"no run has {' and '.join(where)}", err=True)
    else:
        say(f"no runs at or below {', '.join(str(root) for root in roots)}", err=True)


def show(
    run: RunPath,
    layers: Annotated[bool, typer.Option("--layers", help="List every layer.")] = False,
    steps: Annotated[bool, typer.Option("--steps", help="List every recorded step.")] = False,
    as_json: Json = False,
) -> None:
    """Show what a run holds, and what it lacks.

    Its state and environment, measures, layers and examples; which parameters have exact
    per-example gradients; layers that never ran, measures that were switched off, records that
    were dropped, and damaged files.

    Examples:
        sonde show runs/seed0
        sonde show runs/seed0 --layers --steps
        sonde show runs/seed0 --json
    """
    from sonde.log import open_run

    from .facts import describe

    with working(f"reading {run}"):
        facts = describe(open_run(run))
    if as_json:
        typer.echo(json.dumps(facts, indent=1, default=str))
    else:
        print_run(facts, all_layers=layers, all_steps=steps)


def tensorboard(
    runs: RunPaths,
    logdir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="One folder per run in DIR; default: RUN/tensorboard."),
    ] = None,
    images: Annotated[bool, typer.Option(help="Draw pictures, too.")] = True,
) -> None:
    """Export runs for TensorBoard, and print the line that opens it.

    Scalars over the steps (stiffness, accuracy and loss, decision regions, CKA of each layer to its
    last step, every recorded scalar) and a few pictures. A second export replaces the first.

    Examples:
        sonde tensorboard runs/seed0
        sonde tensorboard runs/seed0 runs/seed1 --logdir boards
    """
    from sonde.integrations.tensorboard import export as write_events

    use_no_window()
    if logdir is None:
        _refuse_files(runs)
    opened = open_all(runs)
    folders = {}
    for name, run in opened.items():
        folder = None if logdir is None else logdir / name
        with working(name) as start:
            folders[name] = write_events(run, folder, max_images=10 if images else 0, on_part=start)
        say(f"wrote {folders[name]}")
    say(_tensorboard_line(folders, logdir))


def seal(runs: RunPaths) -> None:
    """Seal the journals that a killed training left, into HDF5 segments.

    Readers do not need it: it makes the files open in any HDF5 tool. Journals of a process that
    still writes are left alone.

    Examples:
        sonde seal runs/seed0
    """
    from sonde.log.sealing.seal import seal_run

    for run in runs:
        with working(f"sealing {run}"):
            segments = seal_run(run)
        for segment in segments:
            say(f"wrote {segment}")
        if not segments:
            say(f"{run}: nothing to seal")


def verify(runs: RunPaths) -> None:
    """Check every byte of runs against its checksum.

    Each damaged file is named with the records in it that cannot be read; they are never returned
    as data. Without damage the exit status is 0, otherwise 1. A record that was being written when
    its process was killed is no damage: nothing committed is lost. Exported runs are checked
    likewise.

    Examples:
        sonde verify runs/seed0
        sonde verify runs/seed0 runs/seed1
    """
    from sonde.log import open_run
    from sonde.log.verify import verify_run

    is_damaged = False
    for run in runs:
        with working(f"verifying {run}"):
            damage = verify_run(run)
            unfinished = open_run(run).unfinished
        for item in damage:
            say(f"{run}: {item}")
        for item in unfinished:
            say(
                f"{run}: {item}: it was being written when its process ended; nothing committed is "
                "lost"
            )
        if not damage:
            say(f"{run}: intact")
        is_damaged = is_damaged or bool(damage)
    if is_damaged:
        sys.exit(1)


def _check_existence(paths: list[Path]) -> None:
    for path in paths:
        if not path.exists():
            raise RunNotFoundError(f"{path} does not exist; expected a folder of runs")


def _refuse_files(runs: list[Path]) -> None:
    for path in runs:
        if path.is_file():
            raise InvalidInputError(f"{path} is a file; name a folder by --logdir")


def _tensorboard_line(folders: dict[str, Path], logdir: Path | None) -> str:
    """Write the command that shows exported runs, with their names."""
    parents = {folder.parent.parent for folder in folders.values()}
    if logdir is None and len(folders) > 1 and len(parents) > 1:
        spec = ",".join(f"{name.replace('/', '_')}:{folder}" for name, folder in folders.items())
        return shlex.join(["tensorboard", "--logdir_spec", spec])
    first = next(iter(folders.values()))
    shown = logdir or (first if len(folders) == 1 else first.parent.parent)
    return shlex.join(["tensorboard", "--logdir", str(shown)])


app.command(
    "run",
    help=help_of(run_script),
    # Whatever follows the script is its own, options too.
    context_settings={"allow_interspersed_args": False},
)(run_script)
for _function in (
    ls,
    show,
    cka,
    blocks,
    components,
    stiffness,
    boundary,
    sweep,
    tensorboard,
    export,
    seal,
    verify,
):
    app.command(help=help_of(_function))(_function)
