"""What `sonde run` records: its options and its configuration file, made into a `Config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sonde.exceptions import RunExistsError
from sonde.hooks import Config, Full, Gram, Probe, Sketch, every
from sonde.hooks.config.config import as_config
from sonde.hooks.config.file import ConfigFile, read_config
from sonde.hooks.config.places import Place
from sonde.hooks.config.values import to_layers
from sonde.hooks.stores.stores import Store
from sonde.log.format.files import RUN_FILE

from .run_script import Launch


class LaunchConfig:
    """Makes the configuration of a launch, once it is known what the training's batches hold.

    Attributes:
        needs_first: Whether examples of the first batches are measured.
        num_first: How many of them are asked for; None if that is not said.
        is_in_band: Whether the training itself is measured.
        has_path: Whether it is said where to record.

    Raises:
        SondeError: If the configuration has no meaning.
        OSError: If its file cannot be read.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._file: ConfigFile | None = None
        self.num_first = launch.examples
        self.needs_first, self.is_in_band = True, False
        self.has_path = launch.out is not None
        if launch.config is not None:
            self._file = read_config(launch.config)
            self.has_path = self.has_path or self._file.given.get("path") is not None
            # Any probe shows what the file needs of one.
            config = self.make(Path("runs"), Probe(torch.eye(3), [0, 1, 2]))
            sources = self._file.sources
            self.needs_first = sources.is_first_used
            self.num_first = self.num_first or sources.num_first_examples
            self.is_in_band = _is_in_band(config)

    @property
    def chooses(self) -> bool:
        """Whether nothing says what is measured, but by default."""
        return self._file is None or self._file.given.get("measures") is None

    @property
    def store(self) -> Store | None:
        """The form kept of activations, if the command says it."""
        kind, _, dim = (self._launch.store or "").partition(":")
        if kind == "sketch":
            return Sketch(int(dim))
        return {"gram": Gram(), "full": Full()}.get(kind)

    def make(self, path: Path, first: Probe | None, **others: Any) -> Config:
        """Make the configuration.

        Args:
            path: Where to record, if nothing else says it.
            first: The examples of the first batches; None where they make no probe.
            others: Further arguments of `Config`, for what nothing else says.

        Raises:
            SondeError: If something has no meaning.
        """
        launch = self._launch
        if launch.out is not None:
            path = launch.out
        elif self._file is not None and self._file.given.get("path") is not None:
            path = Path(self._file.given["path"])
        options: dict[str, Any] = {"path": path}
        if launch.layers:
            options["layers"] = to_layers(list(launch.layers), Place(Path("--layers")))
        if launch.every is not None:
            options["when"] = every(launch.every)
        if self._file is None:
            return as_config(options.pop("path"), {"probe": first, **others, **options})
        stated = {name for name, value in self._file.given.items() if value is not None}
        others = {name: value for name, value in others.items() if name not in stated}
        return self._file.config(first, **others, **options)


def check_config(launch: Launch, *, is_first: bool) -> None:
    """Refuse what has no meaning, and a run directory that holds a run.

    Args:
        launch: What is to be run.
        is_first: This is rank 0, which makes the run directory; others find it there.

    Raises:
        RunExistsError: If the directory holds a run, and nothing says what to do with it.
        SondeError: If something has no meaning.
        OSError: If the file cannot be read.
    """
    made = LaunchConfig(launch)
    if not made.has_path or not is_first:
        return
    config = made.make(Path("runs"), Probe(torch.eye(3), [0, 1, 2]))
    goes_on = config.options.get("resume") or config.options.get("overwrite")
    if not goes_on and (Path(config.path) / RUN_FILE).exists():
        raise RunExistsError(f"{config.path} already holds a run; record into another directory")


def _is_in_band(config: Config) -> bool:
    if config.measures is None:
        return config.probe is None
    return any(measure.training is not None for measure in config.measures)
