"""Families: several runs, told apart by values of their configuration."""

from __future__ import annotations

import glob
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from sonde.exceptions import InvalidInputError, RunNotFoundError, SondeError
from sonde.log.format.files import RUN_FILE, find_runs
from sonde.visible import visible

from .configs import Value, Wanted, fits, flat_config, order_of
from .measure_log import listing
from .predictions import accuracy_of
from .run import Run, open_run

if TYPE_CHECKING:
    import pandas

Paths = str | os.PathLike[str]

_MAX_NAMED = 8


def open_runs(paths: Paths | Iterable[Paths]) -> Family:
    """Open several runs as a family.

    Args:
        paths: A run directory or exported file, a folder of runs, a glob such as `runs/*` (`**`
            goes into folders), or several of these. A run that is named twice is opened once.

    Returns:
        The runs, in the order of the paths; those of a folder or a glob are sorted by name. What a
        glob fits beside runs is named in a warning.

    Raises:
        RunNotFoundError: If a path or a glob leads to no run.
        FormatError: If a run was written by a newer sonde.
        DamageError: If what a run says of itself is damaged.

    Example::

        family = sonde.open_runs("runs/*")
        family.table()
        sonde.analysis.cka(family.where(width=64), by="noise")
    """
    several = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    found: dict[Path, Path] = {}
    for path in several:
        for run in _runs_at(os.fspath(path)):
            found.setdefault(run.resolve(), run)
    if not found:
        raise RunNotFoundError("no paths were given; expected run directories, globs or folders")
    return Family([open_run(path) for path in found.values()])


def _runs_at(path: str) -> list[Path]:
    """Return the runs that a path or glob leads to.

    Raises:
        RunNotFoundError: If there is none.
    """
    if os.path.lexists(path) or not glob.has_magic(path):
        at = Path(path)
        if at.is_file():
            return [at]
        runs = find_runs(at) if at.is_dir() else []
        if not runs:
            problem = "holds no run" if at.is_dir() else "does not exist"
            raise RunNotFoundError(
                f"{path} {problem}; expected a run directory (a folder with {RUN_FILE}), an "
                "exported run, a folder of runs or a glob"
            )
        return runs
    matches = [Path(match) for match in sorted(glob.glob(path, recursive=True))]
    runs, others = [], []
    for match in matches:
        below = [match] if match.suffix == ".h5" and match.is_file() else find_runs(match)
        inside = any(run in match.parents for run in runs)  # What `**` fits in a run is the run's.
        runs += [] if inside else below
        others += [] if inside or below else [str(match)]
    if not runs:
        raise RunNotFoundError(
            f"the glob {path} fits {len(matches)} files or folders, none of them a run; expected "
            f"folders with {RUN_FILE}, folders of them, or exported runs (.h5)"
        )
    if others and "**" not in path:
        warnings.warn(
            f"{path} fits {len(others)} that hold no run, which are left out: {listing(others)}",
            RuntimeWarning,
            stacklevel=3,
        )
    return runs


class Family(Sequence[Run]):
    """Several runs: a sequence of them, which knows their configurations.

    `family[0]` and `family["seed0"]` are runs, `family[:2]` is a family; `len(family)` and
    iteration are those of a list.

    Args:
        runs: The runs.

    Attributes:
        runs: The runs, as a list.
    """

    def __init__(self, runs: Iterable[Run]) -> None:
        self.runs = list(runs)
        self._configs = [flat_config(run.info.get("config")) for run in self.runs]

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    @overload
    def __getitem__(self, key: int | str) -> Run: ...

    @overload
    def __getitem__(self, key: slice) -> Family: ...

    def __getitem__(self, key: int | str | slice) -> Run | Family:
        """Return a run by its position or name, or a family of some.

        Raises:
            RunNotFoundError: If no run has this name.
        """
        if isinstance(key, slice):
            return Family(self.runs[key])
        if isinstance(key, str):
            if key not in self.names:
                near = get_close_matches(key, self.names)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                raise RunNotFoundError(
                    f"no run of the family is called '{key}'{hint}; runs: {listing(self.names)}"
                )
            return self.runs[self.names.index(key)]
        return self.runs[key]

    @property
    def names(self) -> list[str]:
        """The names of the runs; their paths where names repeat."""
        names = [run.name for run in self.runs]
        return [run.name if names.count(run.name) == 1 else str(run.path) for run in self.runs]

    @property
    def configs(self) -> list[dict[str, Value]]:
        """The configuration of each run, flat: nested keys are joined by dots."""
        return [dict(config) for config in self._configs]

    @property
    def keys(self) -> list[str]:
        """Every key that some run's configuration has, in the order they were first met."""
        return list(dict.fromkeys(key for config in self._configs for key in config))

    @property
    def varying(self) -> list[str]:
        """The keys whose value is not the same in all runs, or that some runs lack."""
        return [
            key
            for key in self.keys
            if len({(key in config, config.get(key)) for config in self._configs}) > 1
        ]

    def lacking(self, key: str) -> list[str]:
        """Return the names of the runs whose configuration lacks a key.

        Raises:
            InvalidInputError: If all runs lack it.
        """
        if key not in self.keys:
            near = get_close_matches(key, self.keys)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise InvalidInputError(
                f"no run of the family has the configuration key '{key}'{hint}; keys: "
                f"{listing(self.keys)} (give them when recording: Recorder(…, config={{…}}))"
            )
        pairs = zip(self.names, self._configs, strict=True)
        return [name for name, config in pairs if key not in config]

    def where(self, wanted: Mapping[str, Wanted] | None = None, /, **config: Wanted) -> Family:
        """Return the runs whose configuration has these values.

        Args:
            wanted: Values by key, for keys that are no Python names, such as `optimizer.lr`.
            config: Values by key: a value to equal, a list of which one has to be equal, or a
                function of the value.

        Returns:
            The runs that fit all of them, perhaps none. Runs that lack a key are left out, and a
            warning names them.

        Raises:
            InvalidInputError: If no run has a key.

        Example::

            family.where(width=[32, 64], noise=lambda noise: noise < 0.2)
        """
        asked = {**(wanted or {}), **config}
        left_out = {key: self.lacking(key) for key in asked}
        _warn_of_lacking(left_out, "left out of where()")
        return Family(
            run
            for run, values in zip(self.runs, self._configs, strict=True)
            if all(key in values and fits(values[key], value) for key, value in asked.items())
        )

    def by(self, *keys: str) -> dict[Any, Family]:
        """Group the runs by values of their configuration.

        Args:
            keys: One or more keys.

        Returns:
            A family per value of the key, or per tuple of values of several keys, sorted. Runs that
            lack a key are in none, and a warning names them.

        Raises:
            InvalidInputError: If no key is given, or no run has one.

        Example::

            for (width, noise), runs in family.by("width", "noise").items():
                print(width, noise, len(runs))
        """
        groups, left_out = self._groups(keys)
        _warn_of_lacking(left_out, f"left out of by({', '.join(map(repr, keys))})")
        return {value[0] if len(keys) == 1 else value: group for value, group in groups.items()}

    def _groups(
        self, keys: Sequence[str]
    ) -> tuple[dict[tuple[Value, ...], Family], dict[str, list[str]]]:
        """Return the groups by tuples of values, sorted, and who lacks which key.

        Raises:
            InvalidInputError: If no key is given, or no run has one.
        """
        if not keys:
            raise InvalidInputError(f"no key to group by was given; keys: {listing(self.keys)}")
        left_out = {key: names for key in keys if (names := self.lacking(key))}
        groups: dict[tuple[Value, ...], list[Run]] = {}
        for run, values in zip(self.runs, self._configs, strict=True):
            if all(key in values for key in keys):
                groups.setdefault(tuple(values[key] for key in keys), []).append(run)
        in_order = sorted(groups, key=lambda group: [order_of(value) for value in group])
        return {group: Family(groups[group]) for group in in_order}, left_out

    def table(self) -> pandas.DataFrame:
        """Return a row per run: its configuration, steps, measures and accuracy.

        Returns:
            A DataFrame, indexed by the name of the run, with a column per configuration key, and
            `state`, `num_steps`, `last_step`, `measures`, `accuracy` (of the last predictions, in
            [0, 1], if they were recorded; of each source where there are several) and `path`. What
            a run lacks is missing. Keys that are called like one of these have `config.` before.
        """
        import pandas

        rows = [_facts(run) for run in self.runs]
        sources = dict.fromkeys(source for row in rows for source in row["accuracies"])
        taken = {"run", "state", "num_steps", "last_step", "measures", "accuracy", "path"}
        columns: dict[str, list[Any]] = {}
        for key in self.keys:
            name = f"config.{key}" if key in taken else key
            columns[name] = [config.get(key) for config in self._configs]
        for name in ("state", "num_steps", "last_step", "measures"):
            columns[name] = [row[name] for row in rows]
        for source in sources:
            name = "accuracy" if len(sources) == 1 else f"accuracy of {source}"
            columns[name] = [row["accuracies"].get(source) for row in rows]
        columns["path"] = [str(run.path) for run in self.runs]
        return pandas.DataFrame(columns, index=pandas.Index(self.names, name="run"))

    def __repr__(self) -> str:
        keys = f"; {', '.join(self.varying)} differ" if self.varying else ""
        return f"<Family of {len(self)}: {listing(self.names, _MAX_NAMED)}{keys}>"

    def _repr_html_(self) -> str:
        table = self.table().drop(columns="path")
        table.columns = [visible(name) for name in table.columns]
        table.index = table.index.map(visible)
        shown = table.map(lambda value: visible(value) if isinstance(value, str) else value)
        return str(shown.to_html(na_rep="–", max_rows=60))  # It escapes what would be markup.


def _facts(run: Run) -> dict[str, Any]:
    steps = run.steps()
    accuracies: dict[str, float] = {}
    for source in run.sources("predictions"):
        try:
            value = accuracy_of(run["predictions", source])
        except SondeError:  # Damaged records are named by `sonde verify`; a table has a gap.
            value = None
        if value is not None:
            accuracies[source] = value
    return {
        "state": run.state,
        "num_steps": len(steps),
        "last_step": steps[-1] if steps else None,
        "measures": ", ".join(run.measures),
        "accuracies": accuracies,
    }


def lacking_text(left_out: Mapping[str, Sequence[str]]) -> str:
    """Say which runs lack which configuration keys; nothing where none does."""
    return "; ".join(
        f"{len(names)} without the configuration key '{key}': {listing(names, _MAX_NAMED)}"
        for key, names in left_out.items()
        if names
    )


def _warn_of_lacking(left_out: Mapping[str, Sequence[str]], what: str) -> None:
    text = lacking_text(left_out)
    if text:
        warnings.warn(f"runs {what}: {text}", RuntimeWarning, stacklevel=3)
