"""An exported run is an ordinary HDF5 file: h5py, xarray and h5dump open it, with names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import hdf5plugin
import numpy as np
import pytest
import xarray

from sonde.log import LogArray, LogWriter, open_run
from sonde.log.export import export_run
from sonde.log.export import writer as export_writer_module

from .conftest import new_run
from .test_export import COMPRESSIONS
from .test_ranks import write_rank

STEPS = [0, 10, 20, 30]
NUM_EXAMPLES = 6


@pytest.fixture(params=COMPRESSIONS)
def exported(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Export every kind of stream in small chunks: dense, gappy, ragged, bfloat16, scalar."""
    monkeypatch.setattr(export_writer_module, "CHUNK_BYTES", 100)
    monkeypatch.setattr(export_writer_module, "_PLAIN_BYTES", 0)
    writer = LogWriter(new_run(tmp_path / "run"), seal=False)
    ids = 100 + np.arange(NUM_EXAMPLES)
    targets = LogArray("target", ids % 3, ("example",))
    writer.add_table("probe", [LogArray("id", ids, ("example",)), targets])
    for step in STEPS:
        gram = step + np.arange(NUM_EXAMPLES**2, dtype=np.float32).reshape(NUM_EXAMPLES, -1)
        bits = np.full((NUM_EXAMPLES, 3), 0x3FC0, np.uint16)
        arrays = [
            LogArray("gram", gram, ("example", "other_example"), "conv1"),
            LogArray("full", bits, ("example", "feature"), "layer1.0/fc", "bfloat16"),
            LogArray("mask", bits > step, ("example", "feature")),
            LogArray("ragged", np.arange(step), ("element",)),
            LogArray("loss", np.array(step / 2), ()),
        ]
        if step == 10:
            arrays.append(LogArray("grad", np.ones(2), ("feature",), "rare"))
            arrays.append(LogArray("late", bits, ("example", "feature"), "rare", "bfloat16"))
        writer.append("activations", "probe", step, arrays, {"step": step})
    writer.close()
    out = tmp_path / f"{request.param}.h5"
    return export_run(open_run(tmp_path / "run"), out, compression=request.param)


def test_h5py_alone_reads_every_stream(exported: Path) -> None:
    code = """if True:
        import sys, h5py, hdf5plugin
        with h5py.File(sys.argv[1]) as file:
            group = file["activations/probe"]
            print(group["step"][:].tolist())
            gram, full = group["conv1:gram"], group["layer1.0%2Ffc:full"]
            print(gram[2, 5].tolist(), [list(dim) for dim in gram.dims])
            print(full[:].min(), full.attrs["layer"].decode())
            print(group["mask"].dtype, group["mask"][3].sum())
            print(group["ragged"].shape, group["ragged::shape"][:].ravel().tolist())
            print(group["loss"][:].tolist(), file["tables/probe/target"][:].tolist())
            print(group["rare:grad"][:].tolist(), group["rare:late"][2].max())
            print(group["presence"][:].sum(), len(group["presence"]), file.attrs["sonde_export"])
            assert "sonde" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", code, exported], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "[0, 10, 20, 30]",
        "[50.0, 51.0, 52.0, 53.0, 54.0, 55.0] [['step'], ['example'], ['other_example']]",
        "1.5 layer1.0/fc",
        "bool 18",
        "(60,) [0, 10, 20, 30]",
        "[0.0, 5.0, 10.0, 15.0] [1, 2, 0, 1, 2, 0]",
        "[[nan, nan], [1.0, 1.0], [nan, nan], [nan, nan]] nan",
        "22 7 1",
    ]


def test_chunks_are_compressed_as_the_file_says(exported: Path) -> None:
    expected = {"zstd": 32015, "gzip": h5py.h5z.FILTER_DEFLATE}.get(exported.stem)
    with h5py.File(exported) as file:
        for stream in file["activations/probe"].values():
            if "field" not in stream.attrs or stream.chunks is None:
                continue
            creation = stream.id.get_create_plist()
            filters = [creation.get_filter(n)[0] for n in range(creation.get_nfilters())]
            assert filters == ([] if expected is None else [expected])
        assert file["activations/probe/conv1:gram"].chunks == (1, 3, 6)
        assert file["activations/probe/loss"].chunks == (2,)
        # Of a record that lacks a stream nothing is stored.
        assert file["activations/probe/rare:late"].id.get_num_chunks() == 1


def test_xarray_opens_it_with_names_and_ids(exported: Path) -> None:
    assert hdf5plugin.version
    with xarray.open_dataset(exported, group="activations/probe", engine="h5netcdf") as dataset:
        assert dataset["conv1:gram"].dims == ("step", "example", "other_example")
        ids = list(range(100, 100 + NUM_EXAMPLES))
        assert dataset["example"].values.tolist() == ids
        assert dataset["other_example"].values.tolist() == ids
        picked = dataset["conv1:gram"].sel(step=20, example=103)
        assert picked.values.tolist() == [38, 39, 40, 41, 42, 43]
        assert dataset["layer1.0%2Ffc:full"].dims == ("step", "example", "feature")
        assert dataset["layer1.0%2Ffc:full"].values.max() == 1.5
        assert dataset["rare:grad"].dims == ("step", "feature_2")


def test_xarray_opens_it_as_a_tree(exported: Path) -> None:
    with xarray.open_datatree(exported, engine="h5netcdf") as tree:
        assert {"/activations/probe", "/tables/probe"} <= set(tree.groups)
        assert tree["activations/probe"].to_dataset()["loss"].values.tolist() == [0, 5, 10, 15]
        assert tree["tables/probe"]["target"].dims == ("example",)


@pytest.mark.skipif(shutil.which("h5dump") is None, reason="needs h5dump (Debian: hdf5-tools)")
def test_h5dump_shows_names_and_values(exported: Path) -> None:
    environment = {**os.environ, "HDF5_PLUGIN_PATH": hdf5plugin.PLUGIN_PATH}

    def dump(*options: str) -> str:
        command = ["h5dump", *options, str(exported)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return done.stdout

    names = {line.split()[-1] for line in dump("--contents").splitlines() if " dataset " in line}
    assert {"/activations/probe/conv1:gram", "/activations/probe/step", "/tables/probe/id"} <= names
    values = dump("--dataset=/activations/probe/conv1:gram", "--noindex", "--width=0")
    for number in (30, 65):
        assert f" {number}" in values
    assert "DIMENSION_LIST" in values
    whole = dump("--header")
    assert whole.count('GROUP "probe"') == 2
    assert 'DATASET "layer1.0%2Ffc:full"' in whole


def test_ranks_stand_side_by_side(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    for rank in (0, 1):
        write_rank(run, rank, range(rank, 6, 2))
    with h5py.File(export_run(open_run(run), tmp_path / "out.h5")) as file:
        assert sorted(file) == ["chunk", "chunk_place", "chunks", "metadata", "metadata_byte",
                                "rank0", "rank1"]  # fmt: skip
        assert file["rank1/activations/probe/example"][:].tolist() == [1, 3, 5]
        assert file["rank1/tables/probe/target"][:].tolist() == [7, 21, 35]


def test_the_same_run_gives_the_same_file(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    write_rank(run, 0, range(64))
    paths = [export_run(open_run(run), tmp_path / f"{number}.h5") for number in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
