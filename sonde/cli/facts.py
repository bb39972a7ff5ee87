"""What a run directory holds, as JSON values: the facts that `sonde ls` and `sonde show` print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sonde.exceptions import SondeError
from sonde.log.configs import flat_config
from sonde.visible import TEXT_LENGTH, visible

from .console import iso_time

if TYPE_CHECKING:
    from sonde.log import Damage, MeasureLog, Run

Facts = dict[str, Any]  # Any: JSON values.


def overview(path: Path) -> Facts:
    """Describe a run in a row; one that cannot be read is named with its problem.

    Returns:
        `path`, `name`, `state`, `steps` (first and last, or empty), `measures`, `config` (its
        values by dotted key), `num_records`, `num_bytes` (of the log, on disk), `last_written` (ISO
        time) and `problem`.
    """
    from sonde.log import open_run

    try:
        return _overview(open_run(path))
    except (SondeError, OSError) as error:
        problem = str(error)
        if isinstance(error, OSError) and error.strerror:
            problem = f"{error.strerror}: {error.filename or path}"
        return {
            "path": str(path),
            "name": path.name,
            "state": "unreadable",
            "problem": visible(problem, TEXT_LENGTH),
        }


def describe(run: Run) -> Facts:
    """Describe all that a run holds: the overview and what each part of it is.

    Returns:
        The overview, and `created`, `attempts`, `environment`, `model`, `measure_logs`, `layers`,
        `sources`, `coverage`, `missing`, `disabled`, `gaps`, `notes` and `damage`.
    """
    logs = [run[measure, source] for measure in run.measures for source in run.sources(measure)]
    notes = run.notes
    by_event = {
        key: [note for note in notes if note.get("event") == event]
        for key, event in (("missing", "missing"), ("disabled", "disabled"), ("gaps", "gap"))
    }
    known = {"missing", "disabled", "gap", "coverage", "layers"}
    return {
        **_overview(run),
        "created": run.info.get("created"),
        "attempts": [
            {key: value for key, value in about.items() if key not in ("kind", "sequence", "step")}
            for about in run.attempts
        ],
        "environment": run.info.get("environment") or {},
        "model": run.info.get("model") or {},
        "measure_logs": [_measure(run, log) for log in logs],
        "layers": _layers(run, logs),
        "sources": _sources(run, logs),
        "coverage": _coverage(notes),
        **by_event,
        "notes": [note for note in notes if note.get("event") not in known],
        "damage": [str(damage) for damage in run.damage],
    }


def _overview(run: Run) -> Facts:
    steps = run.steps()
    num_bytes, last_written = _files(run.path)
    return {
        "path": str(run.path),
        "name": run.name,
        "state": run.state,
        "steps": [steps[0], steps[-1]] if steps else [],
        "measures": run.measures,
        "config": flat_config(run.info.get("config")),
        "num_records": sum(
            len(run.steps(measure, source))
            for measure in run.measures
            for source in run.sources(measure)
        ),
        "num_bytes": num_bytes,
        "last_written": iso_time(last_written),
        "problem": None if not run.damage else _problem(run.damage),
    }


def _problem(damage: list[Damage]) -> str:
    more = f" (and {len(damage) - 1} more; `sonde verify` lists them)" if len(damage) > 1 else ""
    return f"damaged: {damage[0]}{more}"


def _files(path: Path) -> tuple[int, float]:
    """Return the size of a run's own files in bytes, and when one was last written."""
    from sonde.log.format.files import RUN_FILE, writer_folders

    num_bytes, last_written = 0, 0.0
    files = [path]  # An exported run.
    if path.is_dir():
        folders = [folder for _, _, folder in writer_folders(path)]
        files = [path / RUN_FILE, *(file for folder in folders for file in folder.iterdir())]
    for file in files:
        try:
            status = file.stat()
        except FileNotFoundError:  # A journal that was sealed meanwhile.
            continue
        num_bytes += status.st_size
        last_written = max(last_written, status.st_mtime)
    return num_bytes, last_written


def _measure(run: Run, log: MeasureLog) -> Facts:
    configured: Facts = next(
        (
            entry
            for entry in run.info.get("measures") or []
            if (entry.get("measure"), entry.get("source")) == (log.measure, log.source)
        ),
        {},
    )
    return {
        "measure": log.measure,
        "source": log.source,
        "steps": log.steps,
        "num_layers": len(log.layers),
        "num_examples": _num_examples(log),
        "num_bytes": log.num_bytes,
        "when": configured.get("when"),
        "store": configured.get("store"),
    }


def _num_examples(log: MeasureLog) -> int | None:
    """Count the examples of the last record; None where a record has none, such as a scalar."""
    for stream in log.describe(-1).values():
        for dim, size in zip(stream.dims, stream.shape, strict=True):
            if dim in ("example", "triplet"):
                return size
    return None


def _layers(run: Run, logs: list[MeasureLog]) -> list[Facts]:
    """Describe what was kept of each layer, as its last record has it."""
    kept: dict[str, list[Facts]] = {layer: [] for layer in run.layers}
    for log in logs:
        last = log.describe(-1)
        for layer, field in log.streams:
            if layer is None:
                continue
            # Some fields are in some records only.
            stream = last.get((layer, field)) or next(
                described[layer, field]
                for step in reversed(log[layer].steps)
                if (layer, field) in (described := log.describe(step))
            )
            kept[layer].append(
                {
                    "measure": log.measure,
                    "source": log.source,
                    "field": field,
                    "shape": list(stream.shape),
                    "dtype": stream.dtype,
                }
            )
    types = (run.info.get("model") or {}).get("layers") or {}
    shapes: Facts = {}
    for note in run.notes:
        if note.get("event") == "layers":
            shapes.update(note.get("feature_shapes") or {})
    return [
        {
            "layer": layer,
            # A second call within one forward pass is `name#1`.
            "type": types.get(layer.partition("#")[0]),
            "feature_shape": shapes.get(layer),
            "fields": fields,
        }
        for layer, fields in kept.items()
    ]


def _sources(run: Run, logs: list[MeasureLog]) -> list[Facts]:
    """Describe where the examples of the measures come from."""
    probes = run.info.get("probes") or {}
    found: dict[str, Facts] = {}
    for log in logs:
        if log.source in found:
            found[log.source]["measures"].append(log.measure)
            continue
        ids, targets = log.ids, log.targets
        is_classes = targets is not None and targets.ndim == 1 and targets.dtype.kind in "iub"
        found[log.source] = {
            "source": log.source,
            "num_examples": _num_examples(log) if ids is None else len(ids),
            "ids": None if ids is None or not len(ids) else [int(ids.min()), int(ids.max())],
            "num_classes": len(set(targets.tolist()))
            if is_classes and targets is not None
            else None,
            "measures": [log.measure],
            "probe": probes.get(log.source),
        }
    return list(found.values())


def _coverage(notes: list[Facts]) -> list[Facts]:
    """Count the parameters by how their per-example gradients are computed, per measure."""
    by_measure: dict[str, dict[str, str]] = {}
    for note in notes:
        if note.get("event") == "coverage":
            measure = str(note.get("measure", "example_gradients"))
            by_measure.setdefault(measure, {}).update(note.get("parameters") or {})
    facts = []
    for measure, parameters in by_measure.items():
        kinds = [str(how).partition(":")[0] for how in parameters.values()]
        facts.append(
            {
                "measure": measure,
                "counts": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
                "not_exact": {name: how for name, how in parameters.items() if how != "exact"},
            }
        )
    return facts
