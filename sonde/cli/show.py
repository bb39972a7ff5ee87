"""How `sonde ls` and `sonde show` print the facts of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sonde.sizes import size_text
from sonde.visible import TEXT_LENGTH, visible

from .console import (
    age_text,
    console,
    plural,
    steps_text,
    table,
    time_text,
)

if TYPE_CHECKING:
    from rich.console import Console

    from .facts import Facts

MAX_LAYERS = 30

_STATE_STYLES = {
    "finished": "green",
    "recording": "cyan",
    "interrupted": "yellow",
    "unreadable": "red",
}


def print_overviews(
    overviews: Sequence[Facts], config: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Print a row per run, and below the table why a run cannot be read.

    Args:
        overviews: The runs.
        config: What stands beside each: a text per run, by configuration key.
    """
    config = config or {}
    out = console()
    rows = [
        [
            facts["path"],
            _state(facts),
            "–".join(str(step) for step in dict.fromkeys(facts.get("steps") or [])) or "–",
            str(facts.get("num_records", "–")),
            size_text(facts["num_bytes"]) if "num_bytes" in facts else "–",
            age_text(facts.get("last_written")),
            ", ".join(facts.get("measures") or ["–"]),
            *(texts[index] for texts in config.values()),
        ]
        for index, facts in enumerate(overviews)
    ]
    columns = ("run", "state", "steps", "records", "size", "written", "measures", *config)
    right = ("steps", "records", "size", "written", *config)
    out.print(table(columns, rows, right=right))
    for facts in overviews:
        if facts["problem"]:
            out.print(f"{facts['path']}: {facts['problem']}")


def print_run(facts: Facts, *, all_layers: bool = False, all_steps: bool = False) -> None:
    """Print all that is known of a run.

    Args:
        facts: From `describe`.
        all_layers: List every layer, and not only the first.
        all_steps: List every step, and not only their span.
    """
    out = console()
    _print_head(out, facts)
    _print_measures(out, facts["measure_logs"], all_steps)
    _print_layers(out, facts["layers"], all_layers)
    _print_sources(out, facts["sources"])
    _print_coverage(out, facts["coverage"])
    _print_notes(out, facts)
    _section(out, "Damage: records that cannot be read", facts["damage"])


def _print_head(out: Console, facts: Facts) -> None:
    from rich.text import Text

    out.print(Text.assemble((facts["name"], "bold"), "  ", _state(facts), f"  {facts['path']}"))
    written = time_text(facts["last_written"])
    out.print(f"created      {time_text(facts['created'])}, last written {written}")
    size = f"{plural(facts['num_records'], 'record')}, {size_text(facts['num_bytes'])} on disk"
    out.print(f"log          {size}")
    attempts = facts["attempts"]
    for about in attempts:
        resumed = f", resumed at step {about['resume_step']}" if about.get("resume_step") else ""
        pid = f", process {about['pid']}" if "pid" in about else ""
        out.print(f"attempt {about['attempt']}    rank {about['rank']}{pid}{resumed}")
    model = facts["model"]
    if model:
        parameters = model.get("num_parameters")
        size = f", {parameters:,} parameters" if isinstance(parameters, int) else ""
        out.print(f"model        {model.get('class', 'unknown')}{size}")
    environment = dict(facts["environment"])
    packages = environment.pop("packages", None) or {}
    devices = environment.pop("devices", None) or []
    for name, value in environment.items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        if text is not None:
            out.print(f"{name.replace('_', ' '):<12} {text}")
    if packages:
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        out.print(f"packages     {versions}")
    if devices:
        out.print(f"devices      {', '.join(str(device) for device in devices)}")


def _print_measures(out: Console, logs: Sequence[Facts], all_steps: bool) -> None:
    rows = [
        [
            log["measure"],
            log["source"],
            steps_text(log["steps"], every=all_steps),
            str(len(log["steps"])),
            str(log["num_layers"] or "–"),
            str(log["num_examples"] or "–"),
            size_text(log["num_bytes"]),
        ]
        for log in logs
    ]
    numbers = ("records", "layers", "examples", "size")
    out.print()
    if rows:
        columns = ("measure", "source", "steps", *numbers)
        out.print(table(columns, rows, right=numbers, title="Measures"), "")
    else:
        out.print("Nothing is recorded yet.")


def _print_layers(out: Console, layers: Sequence[Facts], all_layers: bool) -> None:
    if not layers:
        return
    columns = list(
        dict.fromkeys((f["measure"], f["source"]) for layer in layers for f in layer["fields"])
    )
    measures = [measure for measure, _ in columns]
    names = [m if measures.count(m) == 1 else f"{m} of {source}" for m, source in columns]
    shown = layers if all_layers else layers[:MAX_LAYERS]
    rows = []
    for layer in shown:
        cells = [
            ", ".join(_field(f) for f in layer["fields"] if (f["measure"], f["source"]) == column)
            for column in columns
        ]
        name, features = layer["layer"] or "(the model)", _shape(layer["feature_shape"])
        rows.append([name, layer["type"] or "–", features, *(cell or "–" for cell in cells)])
    title = f"Layers ({len(layers)})"
    out.print(table(("layer", "type", "features", *names), rows, title=title))
    if len(shown) < len(layers):
        out.print(f"… and {len(layers) - len(shown)} more; --layers lists all")
    out.print()


def _field(field: Facts) -> str:
    return f"{field['field']} {_shape(field['shape'])} {field['dtype']}"


def _shape(shape: Sequence[int] | None) -> str:
    if shape is None:
        return "–"
    return "×".join(str(size) for size in shape) or "scalar"


def _print_sources(out: Console, sources: Sequence[Facts]) -> None:
    known = [source for source in sources if source["num_examples"]]
    if not known:
        return
    rows = []
    for source in known:
        ids = source["ids"]
        probe = source["probe"] if isinstance(source["probe"], dict) else {}
        rows.append(
            [
                source["source"],
                str(source["num_examples"]),
                str(source["num_classes"] or "–"),
                f"{ids[0]} to {ids[1]}" if ids else "–",
                ", ".join(source["measures"]),
                str(probe.get("id_digest", "–"))[:16],
            ]
        )
    columns = ("source", "examples", "classes", "ids", "used by", "digest of ids")
    out.print(table(columns, rows, right=("examples", "classes"), title="Examples"), "")


def _print_coverage(out: Console, coverage: Sequence[Facts]) -> None:
    for part in coverage:
        counts = ", ".join(f"{count} {kind}" for kind, count in part["counts"].items())
        lines = [f"{name}: {how}" for name, how in part["not_exact"].items()]
        title = f"Coverage of {part['measure']}: {counts}"
        _section(out, title, lines or ["every parameter is exact"])


def _print_notes(out: Console, facts: Facts) -> None:
    told = {
        (coverage["measure"], name)
        for coverage in facts["coverage"]
        for name in coverage["not_exact"]
    }
    missing = [
        f"{note.get('layer', note.get('name', 'something'))} "
        f"({note.get('measure', 'any measure')}): "
        f"{note.get('reason', 'no reason given')}"
        for note in facts["missing"]
        if (note.get("measure"), note.get("name")) not in told
    ]
    _section(out, "Missing", missing)
    disabled = [
        f"{note.get('measure', 'unknown measure')} at step {note.get('step')}: "
        f"{note.get('reason', 'no reason given')}"
        for note in facts["disabled"]
    ]
    _section(out, "Measures switched off", disabled)
    gaps = [
        f"{plural(gap.get('num_records', 0), 'record')} ({size_text(gap.get('num_bytes', 0))}), "
        f"steps {gap.get('step')} to {gap.get('last_step')}: {', '.join(gap.get('reasons', []))}"
        for gap in facts["gaps"]
    ]
    _section(out, "Gaps: records that were dropped", gaps)
    _section(out, "Notes", [_note(note) for note in facts["notes"]])


def _note(note: dict[str, Any]) -> str:
    details = {key: value for key, value in note.items() if key not in ("event", "step", "rank")}
    at = f" at step {note['step']}" if note.get("step", -1) >= 0 else ""
    return f"{note.get('event')}{at}: " + ", ".join(f"{k} {v}" for k, v in details.items())


def _section(out: Console, title: str, lines: Sequence[str]) -> None:
    from rich.padding import Padding
    from rich.text import Text

    if not lines:
        return
    out.print(Text(visible(title), style="bold"))
    for line in dict.fromkeys(lines):  # Every attempt notes what it lacks.
        out.print(Padding(Text(visible(line, TEXT_LENGTH)), (0, 0, 0, 2), expand=False))
    out.print()


def _state(facts: Facts) -> Any:  # Any: a rich Text, which is imported where it is made.
    from rich.text import Text

    return Text(facts["state"], style=_STATE_STYLES.get(facts["state"], "yellow"))
