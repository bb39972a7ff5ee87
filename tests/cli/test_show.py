"""`sonde show`: what a run holds, what it lacks, and what is damaged."""

from __future__ import annotations

from pathlib import Path

from sonde.log.format.files import write_run_file

from .conftest import output_of, write_run


def test_show_says_what_there_is_and_what_is_missing(folder: Path) -> None:
    printed = output_of("show runs/seed0")
    for part in [
        "finished",
        "1,234,567 parameters",
        "torch 2.9.0, numpy 2.3.0",
        "NVIDIA H100",
        "0 to 30, every 10",
        "64×32×32",
        "Conv2d",
        "gram 20×20 float64",
        "100 to 119",
        "0123456789abcdef",
        "Coverage of example_gradients: 1 exact, 1 unsupported",
        "rnn.w: unsupported: LSTM on cuDNN",
        "aux.fc (activations): it was never called",
        "margins at step 20: CUDA out of memory",
    ]:
        assert part in printed
    assert "Damage" not in printed


def test_show_lists_steps_and_layers_when_asked(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0, layers=[f"layer{index}" for index in range(40)])
    printed = output_of(f"show {tmp_path}/run")
    assert "layer39" not in printed
    assert "10 more; --layers lists all" in printed
    printed = output_of(f"show {tmp_path}/run --layers --steps")
    assert "layer39" in printed
    assert "0, 10, 20, 30" in printed


def test_show_reports_damage(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0)
    (journal,) = (tmp_path / "run").rglob("*.journal")
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(content)
    assert "does not match its checksum" in " ".join(output_of(f"show {tmp_path}/run").split())


def test_show_describes_a_run_without_records(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    assert "Nothing is recorded yet." in output_of(f"show {tmp_path}")
