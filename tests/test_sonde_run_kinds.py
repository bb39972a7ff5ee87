"""`sonde run` on scripts that are no plain classifiers: the right examples, or a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

import sonde
from tests.test_sonde_run import Ended, lines_of_sonde, run_bare, run_python, run_recorded

MAX_BYTES = 1 << 20


def recorded(line: str, folder: Path, *options: str) -> tuple[Ended, sonde.Run]:
    """Run a script bare and recorded, compare both, and open the run."""
    bare = run_bare(line, folder)
    ended = run_recorded(line, folder, "--out", "run", *options)
    assert "digest" in bare.stdout, bare.stderr
    assert (ended.code, ended.stdout) == (bare.code, bare.stdout), ended.stderr
    run = sonde.open_run(folder / "run")
    assert sum(path.stat().st_size for path in run.path.rglob("*")) < MAX_BYTES
    return ended, run


def test_the_examples_of_inputs_with_time_first_are_the_sequences(tmp_path: Path) -> None:
    ended, run = recorded("time_first.py", tmp_path)
    assert "recording LM into run, on 20 examples of the first batches, " in ended.stderr
    assert run.activations["decoder"].gram(step=0).shape == (20, 20)
    assert run.layers == ["embedding", "rnn[0]", "rnn[1][0]", "rnn[1][1]", "decoder"]


def test_parameters_outside_the_model_that_is_called_are_named(tmp_path: Path) -> None:
    ended, run = recorded("loss_method.py", tmp_path)
    line = (
        "184 parameters that the optimizer trains outside Sequential are not recorded: decoder of "
        "AutoEncoder, as the script calls methods of AutoEncoder, not AutoEncoder itself"
    )
    assert f"sonde: {line}\n" in ended.stderr
    assert line in [note.get("reason") for note in run.notes]


def test_logits_of_all_words_are_left_out_and_said(tmp_path: Path) -> None:
    ended, run = recorded("words.py", tmp_path)
    (line,) = lines_of_sonde(ended)
    assert line.endswith("2.0 KiB a step; left out: predictions (19.5 MiB a step)")
    assert run.measures == ["activations", "scalars"]
    left_out = "left out: predictions (19.5 MiB a step)"
    assert left_out in [note.get("reason") for note in run.notes]


def test_layers_that_are_called_over_and_over_are_left_out_and_said(tmp_path: Path) -> None:
    ended, run = recorded("unrolled_cell.py", tmp_path)
    (line,) = lines_of_sonde(ended)
    assert line.endswith("a step; left out: cell, out (called up to 40 times in a pass)")
    assert run.layers == ["first"]


def test_layers_that_are_asked_for_are_recorded_however_often_they_are_called(
    tmp_path: Path,
) -> None:
    _, run = recorded("unrolled_cell.py", tmp_path, "--layers", "out")
    assert len(run.layers) == 40


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("graph.py", "in band: the model does not run on 2 of its examples alone (mat1 and mat2"),
        ("graph.py --sparse", "in band: sparse inputs cannot be stored as a probe"),
    ],
)
def test_a_graph_is_recorded_in_band(tmp_path: Path, line: str, reason: str) -> None:
    ended, run = recorded(line, tmp_path)
    (told,) = lines_of_sonde(ended)
    assert reason in told
    assert run.sources("activations") == ["training"]
    assert run.activations["b"].gram(step=0).shape == (30, 30)


def test_the_output_beside_a_loss_is_what_is_predicted(tmp_path: Path) -> None:
    ended, run = recorded("loss_and_output.py", tmp_path)
    assert len(lines_of_sonde(ended)) == 1
    assert run.to_xarray()["predictions/probe"]["logits"].shape[1:] == (32, 3)


@pytest.mark.parametrize("flag", ["", " --score"])
def test_a_training_that_calls_forward_is_said_to_be_unseen(tmp_path: Path, flag: str) -> None:
    bare = run_bare(f"forward_direct.py{flag}", tmp_path)
    ended = run_recorded(f"forward_direct.py{flag}", tmp_path)
    assert (ended.code, ended.stdout) == (0, bare.stdout)
    (line,) = lines_of_sonde(ended)
    assert "nothing " in line
    assert "which run no hooks; nothing sees its passes unless it calls the module itself" in line
    assert not (tmp_path / "runs").exists()


def test_ranks_are_analyzed_from_the_shell(tmp_path: Path, is_full: bool) -> None:
    if not is_full:
        pytest.skip("runs with --full")
    words = "-m torch.distributed.run --standalone --nproc_per_node 2 -m sonde run".split()
    script = str(Path(__file__).parent / "scripts" / "ranks.py")
    for name, options in (("gram", []), ("full", ["--store", "full"])):
        ended = run_python([*words, "--out", name, *options, script], tmp_path)
        assert ended.code == 0, ended.stderr
    cka = ["-m", "sonde", "cka"]
    refused = run_python([*cka, "gram"], tmp_path)
    assert refused.code == 1
    assert "read one by run.rank(…), --rank in the shell, or record with" in refused.stderr
    for line, num_examples in (("gram --rank 1", 20), ("full", 40)):
        shown = run_python([*cka, *line.split()], tmp_path)
        assert f"{num_examples} examples of 'probe'" in shown.stdout, shown.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--store", "sketch"], "`--store` (=sketch) must be gram, full or sketch:N"),
        (["--store", "full", "--config", "a.yaml"], "`--store` beside `--config`"),
    ],
)
def test_a_store_that_means_nothing_is_refused(
    tmp_path: Path, options: list[str], message: str
) -> None:
    ended = run_python(["-m", "sonde", "run", *options, __file__], tmp_path)
    assert ended.code == 1
    assert ended.stderr.startswith(f"sonde: {message}")
