"""`sonde export`, and every other command on what it wrote."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from sonde.sizes import size_text

from .conftest import STEPS, call, error_of, output_of


def test_export_says_how_large_the_file_became(folder: Path, tmp_path: Path) -> None:
    printed = output_of(f"export runs/seed0 {tmp_path}/out.h5 --compression gzip")
    size = size_text((tmp_path / "out.h5").stat().st_size)
    num_bytes = size_text(8 * (4 * 8 * 400 + 4 * 400 + 4 * 80 + 4) + 4 * 320)
    assert printed == (
        f"wrote {tmp_path}/out.h5: 20 records, 4 layers, {size} (of {num_bytes}, gzip)\n"
    )


def test_every_command_takes_an_exported_run(folder: Path, tmp_path: Path) -> None:
    for seed in (0, 1):
        output_of(f"export runs/seed{seed} {tmp_path}/seed{seed}.h5 --measures activations")
        output_of(f"export runs/seed{seed} {tmp_path}/seed{seed}.h5 --overwrite")
    one, two = f"{tmp_path}/seed0.h5", f"{tmp_path}/seed1.h5"
    for command in ("cka", "stiffness", "boundary"):
        printed = output_of(f"{command} {one} {two}").replace(".h5", "")
        expected = output_of(f"{command} runs/seed0 runs/seed1")
        words = printed.replace(str(tmp_path), "runs").replace("─", "").split()
        assert words == expected.replace("─", "").split()
    assert output_of(f"verify {one} {two}") == f"{one}: intact\n{two}: intact\n"
    assert "20 records" in output_of(f"show {one}")
    assert output_of(f"tensorboard {one} --logdir {tmp_path}/boards --no-images")
    assert "seed0.h5 is a file; name a folder by --logdir" in error_of(f"tensorboard {one}")


def test_ls_lists_an_exported_run_that_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    output_of(f"export runs/seed0 {out} --measures activations,scalars --steps 0:30:20")
    (facts,) = json.loads(output_of(f"ls {out} --json"))
    assert (facts["num_records"], facts["steps"]) == (4, [0, 20])
    assert facts["num_bytes"] == out.stat().st_size
    os.truncate(out, 5000)
    (facts,) = json.loads(output_of(f"ls {out} --json"))
    assert facts["state"] == "unreadable"
    assert "cut short" in facts["problem"]


def test_verify_names_the_damage_of_an_exported_run(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    output_of(f"export runs/seed0 {out} --layers fc --compression none")
    content = bytearray(out.read_bytes())
    loss = np.array([1 / (1 + step) for step in STEPS]).tobytes()
    content[content.index(loss) + 9] ^= 1
    out.write_bytes(content)
    result = call(f"verify {out}")
    assert result.exit_code == 1
    assert "'loss' (scalars, steps 0 to 30) does not match its checksum (32 bytes" in result.stdout
