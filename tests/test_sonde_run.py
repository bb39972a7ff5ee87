"""`sonde run` records unedited scripts, and changes nothing of what they do."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import pytest

import sonde
from sonde.log.verify import verify_run
from tests.limits import LIMIT_SECONDS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "tests" / "scripts"
ACTIVATIONS = ["activations", "predictions", "scalars"]


@dataclass(frozen=True)
class Case:
    """A script, and what is recorded of it.

    Attributes:
        line: The script and its arguments.
        model: The class that is recorded.
        steps: The steps with activations, by `--every 2`.
        measures: What is recorded.
        num_lines: How many lines are told of it.
        needs: The package it needs.
        is_slow: It is run in full only.
    """

    line: str
    model: str
    steps: list[int]
    measures: list[str] = field(default_factory=lambda: ACTIVATIONS)
    num_lines: int = 1
    needs: str = "torch"
    is_slow: bool = True


CASES = [
    Case("mnist.py", "Net", list(range(0, 21, 2)), needs="sklearn", is_slow=False),
    Case(
        "mnist.py --epochs 1 --workers 2 --start-method fork --every --save-model model.pt",
        "Net",
        list(range(0, 11, 2)),
        needs="sklearn",
    ),
    Case("mnist.py --epochs 1 --workers 1 --start-method spawn", "Net", [*range(0, 11, 2)]),
    Case("imagenet.py", "ResNet", [0, 2], needs="torchvision"),
    # Its examples come one by one in each forward pass, and its first steps pass meanwhile.
    Case(
        "char_rnn.py",
        "RNN",
        [*range(4, 31, 2)],
        # Which of its two outputs the predictions are, nothing tells.
        measures=["activations"],
        num_lines=2,
        is_slow=False,
    ),
    Case("gpt.py", "GPT", [0, 2, 4, 6]),
    Case("gpt.py --compile", "GPT", [0, 2, 4, 6]),
    Case("with_accelerate.py", "Sequential", [0, 2, 4, 6], needs="accelerate"),
    Case(
        "with_trainer.py",
        "BertForSequenceClassification",
        [0, 2, 4],
        measures=["activations", "example_gradients", "predictions", "scalars"],
        needs="transformers",
    ),
    Case("with_lightning.py", "LitClassifier", [*range(0, 13, 2)], needs="lightning"),
    Case("with_timm.py", "ResNet", [0, 2], needs="timm"),
    Case("averaged.py", "Sequential", [0, 2, 4, 6, 8]),
    # It has fewer examples than are waited for, which shows in its second forward pass.
    Case("lbfgs.py", "Sequential", [2, 4], is_slow=False),
]


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    code: int
    stdout: str
    stderr: str


def run_python(words: list[str], folder: Path, **environ: str) -> Ended:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environ}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        env=environment,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def run_bare(line: str, folder: Path) -> Ended:
    script, *arguments = line.split()
    return run_python([str(SCRIPTS / script), *arguments], folder)


def run_recorded(line: str, folder: Path, *options: str) -> Ended:
    script, *arguments = line.split()
    words = ["-m", "sonde", "run", *options, str(SCRIPTS / script), *arguments]
    return run_python(words, folder)


def lines_of_sonde(ended: Ended) -> list[str]:
    return [line for line in ended.stderr.splitlines() if line.startswith("sonde: ")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.line)
def test_a_script_is_recorded_and_runs_as_without(
    tmp_path: Path, case: Case, is_full: bool
) -> None:
    if find_spec(case.needs) is None:
        pytest.skip(f"needs {case.needs}")
    if case.is_slow and not is_full:
        pytest.skip("runs with --full")
    bare = run_bare(case.line, tmp_path)
    assert "digest" in bare.stdout, bare.stderr
    recorded = run_recorded(case.line, tmp_path, "--out", "run", "--every", "2")
    assert (recorded.code, recorded.stdout) == (bare.code, bare.stdout), recorded.stderr
    assert len(lines_of_sonde(recorded)) == case.num_lines
    run = sonde.open_run(tmp_path / "run")
    assert run.info["model"]["class"].rpartition(".")[2] == case.model
    assert run.steps("activations") == case.steps
    assert sorted(run.measures) == case.measures
    assert run.state == "finished"
    assert verify_run(tmp_path / "run") == []


STATES = {
    "exit": "ended by SystemExit",
    "message": "ended by SystemExit",
    "error": "ended by RuntimeError",
    "interrupt": "interrupted",
    "terminated": "ended by SIGTERM",
}


@pytest.mark.parametrize(
    ("how", "code"),
    [("exit", 7), ("message", 1), ("error", 1), ("interrupt", -2), ("terminated", -15)],
)
def test_a_script_ends_as_without(tmp_path: Path, how: str, code: int, is_full: bool) -> None:
    if how not in ("error", "interrupt") and not is_full:
        pytest.skip("runs with --full")
    bare = run_bare(f"ending.py {how}", tmp_path)
    recorded = run_recorded(f"ending.py {how}", tmp_path)
    assert (recorded.code, recorded.stdout) == (bare.code, bare.stdout)
    assert recorded.code == code
    own = [line for line in recorded.stderr.splitlines() if not line.startswith("sonde: ")]
    assert own == bare.stderr.splitlines()
    run = sonde.open_run(tmp_path / "runs" / "ending")
    assert run.steps("activations") == [0, 1, 2, 3]
    assert run.state == STATES[how]


def test_a_model_that_cannot_be_recorded_runs_bare(tmp_path: Path) -> None:
    ended = run_recorded("ending.py scripted", tmp_path)
    assert ended.code == 0
    assert ended.stdout.startswith("trained\n")
    (line,) = lines_of_sonde(ended)
    assert "nothing is recorded, the script runs on: RecursiveScriptModule is a Script" in line
    assert not (tmp_path / "runs").exists()


def test_without_a_training_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("print('hello')")
    ended = run_python(["-m", "sonde", "run", "plain.py"], tmp_path)
    assert ended.stdout == "hello\n"
    assert ended.stderr == "sonde: nothing was recorded: the script did not import torch\n"


def test_a_run_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs" / "lbfgs").mkdir(parents=True)
    ended = run_recorded("lbfgs.py", tmp_path)
    assert "recording Sequential into runs/lbfgs-2, on 12 examples" in ended.stderr
    assert list((tmp_path / "runs" / "lbfgs").iterdir()) == []
    assert sonde.open_run(tmp_path / "runs" / "lbfgs-2").steps("activations") == [2, 3, 4]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("measures: [activation]", "sonde.yaml: measures[0]: got 'activation', which is no"),
        ("when: {evry: 2}", "sonde.yaml: when: got 'evry', which is no schedule; near: every"),
        ("path: old", "old already holds a run"),
    ],
)
def test_a_wrong_configuration_is_told_before_the_script_starts(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    (tmp_path / "sonde.yaml").write_text(text)
    ended = run_recorded("ending.py", tmp_path, "--config", "sonde.yaml")
    assert (ended.code, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"sonde: {message}")
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["none.py"], "there is no script none.py"),
        (["-m", "no.such.module"], "there is no module no.such.module"),
        (["--every", "0", "x.py"], "`--every` (=0) must be >= 1"),
        (["--examples", "1", "x.py"], "`--examples` (=1) must be >= 2"),
        (["--out", "old", "x.py"], "old already holds a run; give another --out"),
    ],
)
def test_what_cannot_be_run_is_an_error_in_a_line(
    tmp_path: Path, options: list[str], message: str
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "run.json").write_text("{}")
    (tmp_path / "x.py").write_text("print('started')")
    ended = run_python(["-m", "sonde", "run", *options], tmp_path)
    assert (ended.code, ended.stdout) == (1, "")
    assert ended.stderr.startswith(f"sonde: {message}")


def test_a_configuration_says_what_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "sonde.yaml").write_text(
        "measures:\n"
        "- activations: {source: training, layers: torch.nn.Linear, store: {sketch: 4}}\n"
        "- predictions: {when: {at: [0, 8]}}\n"
        "when: {every: 4}"
    )
    bare = run_bare("averaged.py", tmp_path)
    ended = run_recorded("averaged.py", tmp_path, "--config", "sonde.yaml", "--out", "run")
    assert ended.stdout == bare.stdout
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("predictions") == [0, 8]
    assert run.steps("activations") == [0, 4]  # Of the 8th step no further one follows.
    assert run.layers == ["0", "3"]
    assert run.activations["0"].features(step=0).shape == (32, 4)


def test_a_module_runs_as_python_m_runs_it(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "__main__.py").write_text(
        "import sys\nfrom . import other\n"
        "print(__name__, __package__, __spec__.name, __file__, sys.argv, sys.path[0], other.x)"
    )
    (tmp_path / "package" / "other.py").write_text("x = 3")
    bare = run_python(["-m", "package", "--out", "a"], tmp_path)
    recorded = run_python(["-m", "sonde", "run", "-m", "package", "--out", "a"], tmp_path)
    assert recorded.stdout == bare.stdout != ""


def test_a_script_has_the_main_module_that_python_gives_it(tmp_path: Path) -> None:
    (tmp_path / "names.py").write_text(
        "import sys\n"
        "own = {k: v for k, v in globals().items() if k not in ('sys', '__loader__')}\n"
        "print(sorted(own), __file__, __spec__, __package__, __builtins__, sys.argv, sys.path[0])\n"
        "print(sys.modules['__main__'].__dict__ is globals(), 'torch' in sys.modules)\n"
        "print(sys.stdout.errors, sys.stderr.errors, sys.excepthook is sys.__excepthook__)"
    )
    bare = run_python(["names.py", "--help"], tmp_path)
    recorded = run_python(["-m", "sonde", "run", "names.py", "--help"], tmp_path)
    assert recorded.stdout == bare.stdout != ""


def test_a_syntax_error_is_shown_as_by_python(tmp_path: Path) -> None:
    (tmp_path / "wrong.py").write_text("def f(:\n")
    bare = run_python(["wrong.py"], tmp_path)
    recorded = run_python(["-m", "sonde", "run", "wrong.py"], tmp_path)
    assert (recorded.code, recorded.stderr) == (bare.code, bare.stderr)


def test_ranks_of_one_launch_record_into_one_run(tmp_path: Path, is_full: bool) -> None:
    if not is_full:
        pytest.skip("runs with --full")
    words = "-m torch.distributed.run --standalone --nproc_per_node 2".split()
    script = str(SCRIPTS / "ranks.py")
    bare = run_python([*words, script], tmp_path)
    for _ in range(2):
        recorded = run_python([*words, "-m", "sonde", "run", script], tmp_path)
        assert sorted(recorded.stdout.split("\n")) == sorted(bare.stdout.split("\n"))
    for name in ("ranks", "ranks-2"):
        run = sonde.open_run(tmp_path / "runs" / name)
        assert run.ranks == [0, 1]
        assert run.steps("activations") == [0, 1, 2, 3, 4]


def test_a_model_whose_inputs_make_no_probe_is_recorded_in_band(tmp_path: Path) -> None:
    (tmp_path / "listed.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(3, 2)\n"
        "    def forward(self, rows):\n"
        "        return self.fc(torch.cat(rows, 1))\n"
        "torch.manual_seed(0)\n"
        "net = Net()\n"
        "optimizer = torch.optim.SGD(net.parameters(), lr=0.1)\n"
        "for _ in range(3):\n"
        "    net([torch.randn(5, 1) for _ in range(3)]).square().sum().backward()\n"
        "    optimizer.step()\n"
        "print([p.sum().item().hex() for p in net.parameters()])"
    )
    bare = run_python(["listed.py"], tmp_path)
    ended = run_python(["-m", "sonde", "run", "listed.py"], tmp_path)
    assert (ended.code, ended.stdout) == (0, bare.stdout)
    assert "into runs/listed, in band: its input `rows` is a list; a probe takes" in ended.stderr
    run = sonde.open_run(tmp_path / "runs" / "listed")
    assert run.steps("activations") == [0, 1, 2]
    assert run.sources("activations") == ["training"]
    assert run.activations["fc"].gram(step=0).shape == (5, 5)


PLAIN_LOOP = """
import torch
torch.manual_seed(0)
model = torch.nn.Linear(8, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(torch.randn(32, 8)), torch.randint(3, (32,))).backward()
    optimizer.step()
print(model.weight.sum().item().hex())
"""


@pytest.mark.parametrize(
    "first",
    [
        "import importlib.util\nassert importlib.util.find_spec('torch') is not None",
        "import importlib.util\nfor _ in range(3): importlib.util.find_spec('torch').loader",
        "import transformers",
        "import datasets",
        "import peft",
    ],
)
def test_a_library_that_asks_for_torch_first_hides_no_training(
    tmp_path: Path, first: str, is_full: bool
) -> None:
    library = first.rpartition("import ")[2]
    if library in ("transformers", "datasets", "peft"):
        if find_spec(library) is None:
            pytest.skip(f"needs {library}")
        if not is_full:
            pytest.skip("runs with --full")
    (tmp_path / "loop.py").write_text(first + PLAIN_LOOP)
    bare = run_python(["loop.py"], tmp_path)
    ended = run_python(["-m", "sonde", "run", "loop.py"], tmp_path)
    assert (ended.code, ended.stdout) == (0, bare.stdout)
    assert sonde.open_run(tmp_path / "runs" / "loop").steps("activations") == [0, 1, 2, 3]


def test_a_warning_of_the_script_appears_as_often_as_without(tmp_path: Path) -> None:
    script = PLAIN_LOOP.replace("torch.nn.Linear(8, 3)", "Net()").replace(
        "torch.manual_seed(0)",
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(8, 3)\n"
        "    def forward(self, x):\n"
        "        return super().forward(torch.nn.functional.dropout2d(x, training=self.training))\n"
        "torch.manual_seed(0)",
    )
    (tmp_path / "loop.py").write_text(script)
    bare = run_python(["loop.py"], tmp_path)
    ended = run_python(["-m", "sonde", "run", "loop.py"], tmp_path)
    assert bare.stderr.count("dropout2d: Received") == 1
    own = [line for line in ended.stderr.splitlines() if not line.startswith("sonde: ")]
    assert own == bare.stderr.splitlines()
