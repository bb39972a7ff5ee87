"""Names of a log reach no terminal, figure, page or board as anything but letters."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from typer.testing import CliRunner

from sonde import analysis, open_run
from sonde.analysis import plots
from sonde.cli import app
from sonde.exceptions import LayerNotFoundError, SondeWarning
from sonde.log import LogArray, LogWriter
from sonde.log.format.files import write_run_file
from sonde.visible import visible, visible_lines

HOSTILE = "\x1b]0;owned\x07\x1b[2J\nfinished \u202e<script>alert(1)</script>$\\frac{$"
LONG = "x" * 100_000
PAIRS = ("example", "other_example")


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    """Write a run each of whose names is hostile."""
    path = tmp_path / "run"
    path.mkdir()
    model = {"class": HOSTILE, "num_parameters": 3, "layers": {HOSTILE: HOSTILE, LONG: LONG}}
    environment = {"python": HOSTILE, HOSTILE: HOSTILE, "packages": {HOSTILE: HOSTILE}}
    write_run_file(path, {"created": HOSTILE, "model": model, "environment": environment})
    writer = LogWriter(path, seal=False)
    for source in (HOSTILE, "probe"):
        writer.add_table(source, [LogArray("id", np.arange(6), ("example",))])
        for step in (0, 1):
            rows = np.random.default_rng(step).normal(size=(6, 4))
            arrays = [LogArray("gram", rows @ rows.T, PAIRS, name) for name in (HOSTILE, LONG, "")]
            writer.append("activations", source, step, arrays)
    writer.append(HOSTILE, HOSTILE, 0, [LogArray(HOSTILE, np.array(1.0), (), HOSTILE)])
    writer.note("missing", 0, measure=HOSTILE, name=HOSTILE, reason=HOSTILE)
    writer.note("coverage", 0, measure=HOSTILE, parameters={HOSTILE: f"fallback: {HOSTILE}"})
    writer.note(HOSTILE, 0, detail=HOSTILE)
    writer.close()
    return path


def assert_harmless(text: str) -> None:
    assert text
    assert [char for char in text if not char.isprintable() and char != "\n"] == []
    assert "\nfinished" not in text
    assert len(text) < 60_000


def test_what_cannot_be_seen_is_escaped_and_what_is_absurd_is_shortened() -> None:
    assert visible("conv1·γ 层") == "conv1·γ 层"
    assert visible("a\x1b[2J\n\u202e\ud800") == "a\\x1b[2J\\n\\u202e\\ud800"
    assert visible("a" * 100 + "b" * 100, 9) == "aaaaaa…bb"
    assert visible_lines("one\r\ntwo") == "one\\r\ntwo"
    assert len(visible_lines("\x00" * 10**6)) < 40_000


@pytest.mark.parametrize(
    "command", ["show RUN --layers --steps", "ls RUN", "verify RUN", "cka RUN --source probe"]
)
def test_terminal_shows_names_as_letters(run_path: Path, command: str) -> None:
    done = CliRunner().invoke(app, command.replace("RUN", str(run_path)).split())
    assert done.exit_code == 0
    assert_harmless(done.stdout)


def test_errors_and_warnings_show_names_as_letters(run_path: Path) -> None:
    done = CliRunner().invoke(app, ["cka", str(run_path)])
    assert done.exit_code == 1
    assert "has several sources" in done.stderr
    assert_harmless(done.stderr)
    with pytest.raises(LayerNotFoundError) as caught:
        open_run(run_path)["activations", "probe"].gram(layer=HOSTILE + "?")
    assert_harmless(str(caught.value))
    assert_harmless(str(SondeWarning(HOSTILE)))


def test_json_of_show_stays_what_it_is(run_path: Path) -> None:
    done = CliRunner().invoke(app, ["show", str(run_path), "--json"])
    assert HOSTILE in json.loads(done.stdout)["measures"]
    assert_harmless(done.stdout[:1000])


def test_pages_escape_names(run_path: Path) -> None:
    page = open_run(run_path)._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert_harmless(page)


def test_figures_show_names_letter_by_letter(run_path: Path, tmp_path: Path) -> None:
    run = open_run(run_path)
    similarity = analysis.cka(run, source="probe")
    similarity.attrs["run"] = similarity.attrs["other_run"] = HOSTILE
    figures = {"cka": plots.cka(similarity)}
    line = xr.Dataset(
        {name: ("step", [0.5, 0.6]) for name in ("fragmentation", "standard_error")},
        coords={"step": [0, 1]},
    )
    figures["fragmentation"] = plots.fragmentation({HOSTILE: line, LONG: line, "_first": line})
    labels = [text.get_text() for text in figures["fragmentation"].legends[0].get_texts()]
    assert len(labels) == 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        for name, figure in figures.items():
            figure.savefig(tmp_path / f"{name}.png", dpi=50)
            assert (tmp_path / f"{name}.png").stat().st_size < 1 << 20
            assert max(figure.get_size_inches()) < 30


def test_tags_of_tensorboard_are_letters(run_path: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # ships no types
        EventAccumulator,
    )

    from sonde.integrations.tensorboard import export

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        export(run_path, tmp_path / "board")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert len(tags) > 4
    for tag in tags:
        assert_harmless(tag)
