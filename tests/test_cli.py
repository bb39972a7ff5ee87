import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from sonde import __version__
from sonde.cli import app
from sonde.cli.console import steps_text, thinned
from sonde.log import LogArray, LogWriter
from sonde.log.layout import write_run_file
from sonde.log.seal import seal_run
from sonde.sizes import size_text

COMMANDS = "run ls show cka stiffness boundary tensorboard export seal verify".split()
LAYERS = ["conv1", "layer1.0.conv2", "layer1.0.relu", "fc"]
STEPS = [0, 10, 20, 30]
HEAVY = ["torch", "xarray", "pandas", "matplotlib", "h5py", "tensorboard", "scipy"]
TRAINING = """
import torch
model = torch.nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    model(torch.randn(32, 4)).sum().backward()
    optimizer.step()
"""


def write_run(path: Path, seed: int, layers: list[str] = LAYERS) -> None:
    """Write a run of 20 examples of 4 classes whose layers get more alike over the steps."""
    path.mkdir(parents=True)
    write_run_file(
        path,
        {
            "name": path.name,
            "created": "2026-01-02T03:04:05+00:00",
            "environment": {
                "python": "3.12.1",
                "hostname": "node7",
                "packages": {"torch": "2.9.0", "numpy": "2.3.0"},
                "devices": ["NVIDIA H100"],
            },
            "model": {
                "class": "ResNet",
                "num_parameters": 1234567,
                "layers": {"conv1": "Conv2d", "fc": "Linear"},
            },
            "measures": [{"measure": "activations", "source": "probe", "store": "Gram()"}],
            "probes": {"probe": {"num_examples": 20, "id_digest": "0123456789abcdef" * 4}},
        },
    )
    rng = np.random.default_rng(seed)
    writer = LogWriter(path, seal=False)
    targets = np.arange(20) % 4
    writer.add_table(
        "probe",
        [
            LogArray("id", np.arange(20) + 100, ("example",)),
            LogArray("target", targets, ("example",)),
        ],
    )
    writer.add_table(
        "planes",
        [
            LogArray("triplet", np.arange(15).reshape(5, 3), ("triplet", "corner")),
            LogArray("triplet_target", np.arange(15).reshape(5, 3) % 4, ("triplet", "corner")),
            LogArray("coordinates", np.ones((5, 3, 2)), ("triplet", "corner", "axis")),
            LogArray("extent", np.tile([-3.0, 3.0], (5, 2, 1)), ("triplet", "axis", "bound")),
        ],
    )
    common = np.random.default_rng(0).normal(size=(20, 6))
    for step in STEPS:
        features = {name: common * step / 10 + rng.normal(size=(20, 6)) for name in layers}
        gradients = {name: rng.normal(size=(20, 6)) + targets[:, None] for name in layers}
        kernels = {
            measure: [
                LogArray("gram", values @ values.T, ("example", "other_example"), layer=layer)
                for layer, values in arrays.items()
            ]
            for measure, arrays in (("activations", features), ("example_gradients", gradients))
        }
        total = sum(values @ values.T for values in gradients.values())
        kernels["example_gradients"].append(
            LogArray("gram_total", np.asarray(total), ("example", "other_example"))
        )
        for measure, arrays in kernels.items():
            writer.append(measure, "probe", step, arrays)
        labels = rng.integers(0, 4, (5, 8, 8)).astype(np.uint8)
        labels[:, : 2 + step // 10] = 1
        dims = ("triplet", "row", "column")
        planes = [LogArray("labels", labels, dims)]
        writer.append("decision_planes", "planes", step, planes, {"digest": "same"})
        logits = [LogArray("logits", rng.normal(size=(20, 4)), ("example", "class"))]
        writer.append("predictions", "probe", step, logits)
        loss = [LogArray("loss", np.array(1 / (1 + step)), ())]
        writer.append("scalars", "training", step, loss)
    writer.note("layers", 0, measure="activations", feature_shapes={"conv1": [64, 32, 32]})
    writer.note("missing", 0, measure="activations", name="aux.fc", reason="it was never called")
    writer.note("disabled", 20, measure="margins", reason="CUDA out of memory")
    writer.note(
        "coverage",
        0,
        measure="example_gradients",
        source="probe",
        parameters={"conv1.weight": "exact", "rnn.w": "unsupported: LSTM on cuDNN"},
    )
    writer.close()


def write_training(folder: Path) -> None:
    """Write a script that trains a little, also as a module, and a configuration."""
    (folder / "train.py").write_text(TRAINING)
    (folder / "project").mkdir()
    (folder / "project" / "train.py").write_text(TRAINING)
    (folder / "sonde.yaml").write_text("measures: [activations, scalars]\nwhen: {every: 2}")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for seed in (0, 1):
        write_run(folder / "runs" / f"seed{seed}", seed)
    return folder


@pytest.fixture
def folder(written: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where `runs/seed0` and `runs/seed1` are, as the current directory."""
    monkeypatch.chdir(written)
    monkeypatch.delenv("COLUMNS", raising=False)
    return written


def call(line: str) -> Result:
    return CliRunner().invoke(app, shlex.split(line))


def output_of(line: str) -> str:
    result = call(line)
    assert result.exit_code == 0, result.output
    return result.stdout


def error_of(line: str) -> str:
    result = call(line)
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("sonde: ")
    return result.stderr


def examples_of(command: str) -> list[str]:
    wide = CliRunner(env={"COLUMNS": "200"}).invoke(app, [command, "--help"]).stdout
    return [line.strip() for line in re.findall(r"\$ sonde (.*)", wide)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_documents_an_example_of_itself(command: str) -> None:
    examples = examples_of(command)
    assert examples
    assert all(example.split()[0] == command for example in examples)


def test_every_command_and_option_has_help() -> None:
    # Asked in a process of its own: typer's command objects differ between its versions.
    code = """if True:
        import typer.main, sonde.cli
        group = typer.main.get_command(sonde.cli.app)
        print(",".join(group.commands))
        for command in (group, *group.commands.values()):
            assert command.help, command.name
            for parameter in command.params:
                assert getattr(parameter, "help", None), (command.name, parameter.name)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().split(",") == COMMANDS


@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_example_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"seed{seed}", seed)
    monkeypatch.chdir(tmp_path)
    write_training(tmp_path)
    for example in examples_of(command):
        words = shlex.split(example)
        if command == "run":
            done = subprocess.run([sys.executable, "-m", "sonde", *words], check=False)
            assert done.returncode == 0
            continue
        assert output_of(example)
        for option, file in pairwise(words):
            if option in ("--figure", "--csv"):
                assert (tmp_path / file).stat().st_size > 0


@pytest.mark.parametrize("line", ["import sonde.cli", "import sonde.__main__"])
def test_import_loads_nothing_heavy(line: str) -> None:
    assert loaded_after(line) == []


@pytest.mark.parametrize("arguments", ["--help", "cka --help", "--version"])
def test_help_loads_nothing_heavy(arguments: str) -> None:
    assert loaded_after(f"import sonde.cli; sonde.cli.app({arguments.split()})") == []


@pytest.mark.parametrize(
    "arguments",
    [
        "ls runs",
        "show runs/seed0",
        "cka runs/seed0 --figure cka.svg",
        "stiffness runs/seed0",
        "boundary runs/seed0 runs/seed1",
        "tensorboard runs/seed0 --logdir boards",
        "export runs/seed0 out.h5",
        "seal runs/seed0",
    ],
)
def test_no_command_loads_torch(folder: Path, tmp_path: Path, arguments: str) -> None:
    words = [f"{folder}/{word}" if "runs" in word else word for word in arguments.split()]
    line = f"import os, sonde.cli; os.chdir({str(tmp_path)!r}); sonde.cli.app({words})"
    assert "torch" not in loaded_after(line)


def loaded_after(code: str) -> list[str]:
    check = f"import sys; print(*sorted(set(sys.modules) & set({HEAVY})), file=sys.stderr)"
    code = f"import contextlib\nwith contextlib.suppress(SystemExit):\n {code}\n{check}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stderr.split()


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sonde", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"sonde {__version__}\n"


def test_ls_lists_runs_below_a_folder(folder: Path) -> None:
    rows = output_of("ls").splitlines()
    assert [row.split()[:4] for row in rows if "seed" in row] == [
        ["runs/seed0", "finished", "0–30", "20"],
        ["runs/seed1", "finished", "0–30", "20"],
    ]


def test_ls_prints_json(folder: Path) -> None:
    first, _ = json.loads(output_of("ls runs --json"))
    assert first["path"] == "runs/seed0"
    assert first["steps"] == [0, 30]
    assert first["num_records"] == 20
    assert first["num_bytes"] == sum(
        file.stat().st_size for file in (folder / "runs/seed0").rglob("*") if file.is_file()
    ) - sum(f.stat().st_size for f in (folder / "runs/seed0").glob("tensorboard/*"))


def test_ls_names_a_run_it_cannot_read(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"format": 999}')
    printed = " ".join(output_of(f"ls {tmp_path}").split())
    assert "unreadable" in printed
    assert "Install a newer sonde" in printed


def test_ls_says_that_there_are_no_runs(tmp_path: Path) -> None:
    assert call(f"ls {tmp_path}").stderr == f"no runs at or below {tmp_path}\n"


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


def test_cka_says_what_it_is(folder: Path) -> None:
    assert output_of("cka runs/seed0").splitlines()[0] == (
        "debiased CKA of runs/seed0, step 30, 20 examples of 'probe'"
    )
    assert output_of("cka runs/seed0 runs/seed1 --step 0 --biased").splitlines()[0] == (
        "biased CKA of runs/seed0, step 0 and runs/seed1, step 0, 20 examples of 'probe'"
    )


def test_cka_prints_the_matrix_of_the_selected_layers(folder: Path) -> None:
    printed = output_of("cka runs/seed0 --layers conv*,fc")
    assert re.search(r"0 +conv1 +1\.00 +0\.\d\d *\n", printed)
    assert re.search(r"1 +fc +0\.\d\d +1\.00 *\n", printed)
    assert "relu" not in printed


def test_cka_of_many_layers_is_summarised(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0, layers=[f"layer{index}" for index in range(21)])
    printed = output_of(f"cka {tmp_path}/run")
    assert "The matrix (21 × 21) is too large for a table" in printed
    assert re.search(r"layer20 +– +layer\d+ +0\.\d\d", printed)


def test_cka_csv_holds_the_whole_matrix(folder: Path, tmp_path: Path) -> None:
    output_of(f"cka runs/seed0 --csv {tmp_path}/cka.csv")
    header, *rows = (tmp_path / "cka.csv").read_text().splitlines()
    assert header.split(",") == ["layer", *LAYERS]
    matrix = np.array([[float(value) for value in row.split(",")[1:]] for row in rows])
    np.testing.assert_allclose(np.diagonal(matrix), 1)


def test_stiffness_compares_runs(folder: Path, tmp_path: Path) -> None:
    printed = output_of(f"stiffness runs/seed0 runs/seed1 --csv {tmp_path}/out.csv")
    assert printed.startswith(
        "stiffness within and between classes, 1 of 2 parameters (`sonde show` says why): "
        "seed0, seed1, 20 examples of 'probe'\n"
    )
    assert printed.count("seed1 ") == 4
    header, *rows = (tmp_path / "out.csv").read_text().splitlines()
    assert header == (
        "run,step,cosine_within,cosine_between,sign_within,sign_between,num_zero_gradients"
    )
    assert [row.split(",")[:2] for row in rows[:2]] == [["seed0", "0"], ["seed0", "10"]]


def test_stiffness_over_all_pairs_has_one_column_per_kind(folder: Path) -> None:
    header = output_of("stiffness runs/seed0 --by none --steps -1").splitlines()[1]
    assert header.split() == ["run", "step", "cosine", "sign", "zero", "gradients"]


def test_boundary_compares_runs(folder: Path) -> None:
    printed = output_of("boundary runs/seed0 runs/seed1")
    assert "5 planes of 'planes'" in printed
    assert re.search(r"seed0 +seed1 +0\.\d{3} +0\.\d{3}–0\.\d{3} +0\.\d{3} +0\.\d{3}", printed)


def test_runs_of_the_same_name_are_told_apart_by_their_path(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "seed0", 2)
    assert f"runs/seed0, {tmp_path}/seed0," in output_of(f"stiffness runs/seed0 {tmp_path}/seed0")


def test_tensorboard_prints_the_line_that_opens_it(folder: Path, tmp_path: Path) -> None:
    printed = output_of(f"tensorboard runs/seed0 runs/seed1 --logdir {tmp_path} --no-images")
    assert printed.splitlines()[-1] == f"tensorboard --logdir {tmp_path}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["seed0", "seed1"]


def test_seal_turns_journals_into_segments(tmp_path: Path) -> None:
    write_run(tmp_path / "run", 0)
    assert re.fullmatch(r"wrote .*\.h5\n", output_of(f"seal {tmp_path}/run"))
    assert output_of(f"seal {tmp_path}/run") == f"{tmp_path}/run: nothing to seal\n"


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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show nowhere", "nowhere does not exist; expected a run directory"),
        ("show runs", "runs is no run directory, but holds some: runs/seed0, runs/seed1"),
        ("ls nowhere", "nowhere does not exist; expected a folder of runs"),
        ("cka runs/seed0 --layers conv9", "matches 'conv9'.*layers: conv1, layer1.0.conv2"),
        ("cka runs/seed0 --step 7", "step 7 .*recorded steps: 0, 10, 20, 30"),
        ("cka runs/seed0 --source test", "no source 'test'; it has: probe"),
        ("cka runs/seed0 --figure out.docx", r"`--figure` \(=out.docx\) must end in .*png"),
        ("cka runs/seed0 --csv no/such/folder.csv", "No such file or directory"),
        ("stiffness runs/seed0 --layer rnn", "recorded layers: conv1"),
        ("stiffness runs/seed0 --steps 0,x", r"`--steps` \(=0,x\) must be whole numbers"),
        ("boundary runs/seed0 --draw agreement", "name at least 2"),
        ("tensorboard nowhere", "nowhere does not exist"),
        ("seal nowhere", "nowhere does not exist"),
        ("export nowhere out.h5", "nowhere does not exist"),
        ("export runs/seed0 runs", "runs is a folder; expected the name of a file"),
        ("export runs/seed0 runs/seed0/run.json", "run.json exists; replace it by --overwrite"),
        ("export runs/seed0 x.h5 --layers conv9", "matches 'conv9'; did you mean .*conv1"),
        ("export runs/seed0 x.h5 --steps 7", "has step 7; near it: 0, 10"),
        ("export runs/seed0 x.h5 --steps 1:9", "lies in 1:9; recorded steps: 0, 10"),
        ("export runs/seed0 x.h5 --steps 0;9", r"`--steps` \(=0;9\) must be whole .*0:1000:100"),
        ("export runs/seed0 x.h5 --steps 1:2:3:4", "must be whole numbers separated by commas"),
        ("export runs/seed0 x.h5 --measures loss", "no records of 'loss'; it has: activations"),
    ],
)
def test_errors_are_one_line(folder: Path, line: str, message: str) -> None:
    assert re.search(message, error_of(line))


def test_missing_measure_says_what_there_is(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    writer = LogWriter(tmp_path, seal=False)
    writer.append("scalars", "training", 0, [LogArray("loss", np.array(1.0), ())])
    writer.close()
    assert "no records of 'activations'; it has: scalars" in error_of(f"cka {tmp_path}")


@pytest.mark.filterwarnings("default")
def test_warnings_are_one_line_on_stderr(tmp_path: Path) -> None:
    write_run_file(tmp_path, {})
    writer = LogWriter(tmp_path, seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(8), ("example",))])
    features = np.random.default_rng(0).normal(size=(8, 3))
    grams = {"a": features @ features.T, "dead": np.zeros((8, 8))}
    dims = ("example", "other_example")
    arrays = [LogArray("gram", gram, dims, layer=name) for name, gram in grams.items()]
    writer.append("activations", "probe", 0, arrays)
    writer.close()
    result = call(f"cka {tmp_path}")
    assert result.exit_code == 0
    assert re.fullmatch(r"sonde: warning: CKA is NaN .*'dead' .*\n", result.stderr)


def test_piped_output_has_no_escape_codes(folder: Path) -> None:
    assert "\x1b" not in output_of("show runs/seed0")


def test_output_survives_a_terminal_without_unicode(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "sonde", "ls"], capture_output=True, env=environment, check=True
    )
    assert b"runs/seed0" in done.stdout


def test_sizes_have_units() -> None:
    assert [size_text(n) for n in (0, 1023, 1536, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3.0 GiB",
    ]


def test_steps_are_summarised() -> None:
    assert steps_text([0, 10, 20]) == "0 to 20, every 10"
    assert steps_text([0, 1, 10]) == "0 to 10"
    assert steps_text([]) == "–"


def test_thinning_keeps_both_ends() -> None:
    assert thinned(range(10), 4) == [0, 3, 6, 9]
    assert thinned(range(3), 4) == [0, 1, 2]


def test_verify_names_the_damage_and_ends_with_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "runs" / "seed0"
    write_run(path, 0)
    seal_run(path)
    (segment,) = path.rglob("*.h5")
    content = bytearray(segment.read_bytes())
    content[len(content) // 2] ^= 1
    segment.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["verify", "runs/seed0"])
    assert result.exit_code == 1
    assert f"runs/seed0: attempt0-rank0/{segment.name}: " in result.stdout
    assert "checksum" in result.stdout
