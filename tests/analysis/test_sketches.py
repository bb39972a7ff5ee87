"""CKA from sketches: HSIC has the mean of the exact one, and the stated error is honest."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sonde.analysis import cka, cka_over_steps, kernels
from sonde.analysis.arrays import null
from sonde.analysis.arrays.sketches import Sketched, _hsic, sketched_cka
from sonde.exceptions import InvalidInputError, LayerNotFoundError, MismatchError
from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.format.files import write_run_file

Array = npt.NDArray[Any]
NUM_EXAMPLES, NUM_SEEDS = 40, 200


def _project(features: Array, dim: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    num = features.shape[1]
    projection = np.zeros((num, dim))
    projection[np.arange(num), rng.integers(dim, size=num)] = rng.choice([-1.0, 1.0], num)
    return features @ projection


def _sketched(features: Array, dim: int, seed: int, unbiased: bool) -> Sketched:
    rows = _project(features, dim, seed)
    rows -= rows.mean(0)
    return Sketched([kernels.center(rows @ rows.T, unbiased)], [rows])


def _layers() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(NUM_EXAMPLES, 120)) * (1 + np.arange(120)) ** -0.3
    rotated = x @ np.linalg.qr(rng.normal(size=(120, 120)))[0]
    return {"x": x, "rotated": rotated, "other": np.maximum(x @ rng.normal(size=(120, 90)), 0) / 9}


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("offset", [0, 9999], ids=["same projection", "other projection"])
@pytest.mark.parametrize("name", ["x", "rotated", "other"])
def test_hsic_of_sketches_has_the_mean_of_the_exact_one(
    name: str, offset: int, unbiased: bool
) -> None:
    x, y = _layers()["x"], _layers()[name]
    scale = NUM_EXAMPLES * (NUM_EXAMPLES - 3) if unbiased else (NUM_EXAMPLES - 1) ** 2
    exact = kernels.hsic(x @ x.T, y @ y.T, unbiased=unbiased) * scale
    exact_cka = kernels.cka_matrix([x @ x.T], [y @ y.T], unbiased=unbiased)[0, 0]
    found, ratios, errors = [], [], []
    for seed in range(NUM_SEEDS):
        first = _sketched(x, 48, seed, unbiased)
        second = _sketched(y, 48, seed + offset, unbiased)
        found.append(_hsic(first, second, unbiased).value)
        value, error = sketched_cka([first], [second], unbiased=unbiased)
        ratios.append(value[0, 0])
        errors.append(error[0, 0])
    assert abs(np.mean(found) - exact) < 3 * np.std(found) / np.sqrt(NUM_SEEDS)
    assert np.mean(ratios) == pytest.approx(exact_cka, rel=0.08)
    if name == "x" and not offset:
        np.testing.assert_allclose(ratios, 1)
        np.testing.assert_allclose(errors, 0, atol=1e-9)
    else:
        assert np.std(ratios) < np.mean(errors) < 3 * np.std(ratios)


def test_without_a_bucket_hsic_is_that_of_the_remaining_ones() -> None:
    layers = list(_layers().values())
    first, second = (_sketched(features, 12, 3, True) for features in layers[1:])
    found = _hsic(first, second, True).without
    assert first.rows is not None
    assert second.rows is not None
    for bucket in range(12):
        left = [np.delete(side.rows[0], bucket, axis=1) for side in (first, second) if side.rows]
        sides = [Sketched([kernels.center(rows @ rows.T)], [rows]) for rows in left]
        assert found[bucket] == pytest.approx(_hsic(sides[0], sides[1], True).value)


def _write(
    path: Path,
    steps: Mapping[int, Mapping[str, Array]],
    field: str,
    attributes: Mapping[str, Any] | None = None,
) -> Run:
    path.mkdir()
    write_run_file(path, {"measures": []})
    writer = LogWriter(path, seal=False)
    writer.add_table("probe", [LogArray("id", np.arange(NUM_EXAMPLES), ("example",))])
    dims = {"gram": ("example", "other_example"), "gram_blocks": ("entry",)}
    for step, layers in steps.items():
        arrays = [
            LogArray(field, values, dims.get(field, ("example", "feature")), layer)
            for layer, values in layers.items()
        ]
        writer.append("activations", "probe", step, arrays, attributes)
    writer.close()
    return open_run(path)


def _write_sketches(path: Path, dim: int = 64) -> Run:
    layers = _layers()
    steps = {
        0: {name: _project(values, dim, 0) for name, values in layers.items()},
        5: {name: _project(values**3, dim, 0) for name, values in layers.items()},
    }
    return _write(path, steps, "sketch")


def test_the_null_of_sketches_has_the_length_that_is_corrected_for_them(tmp_path: Path) -> None:
    run = _write_sketches(tmp_path / "run", dim=24)
    found = cka(run, step=0, null=6)
    sketches = [_project(values, 24, 0) for values in _layers().values()]
    grams = [kernels.center(sketch @ sketch.T) for sketch in sketches]
    lengths = []
    for sketch, gram in zip(sketches, grams, strict=True):
        layer = Sketched([gram], [sketch - sketch.mean(0)])
        lengths.append(np.sqrt(_hsic(layer, layer, True).value))
    n = len(sketches[0])
    drawn = []
    for order in null.permutations([n], 6):
        moved = [gram[np.ix_(order, order)] for gram in grams]
        drawn.append([[np.vdot(one, other) for other in moved] for one in grams])
    expected = np.mean(drawn, axis=0) / np.outer(lengths, lengths)
    np.testing.assert_allclose(found["null_mean"], expected, rtol=1e-9, atol=1e-12)
    uncorrected = [np.linalg.norm(gram) for gram in grams]
    assert min(np.divide(uncorrected, lengths)) > 1.05  # Without it the null would be too small.


def test_the_error_of_a_mean_of_sketches_is_not_taken_to_be_smaller(tmp_path: Path) -> None:
    runs = [_write_sketches(tmp_path / "a", dim=24), _write_sketches(tmp_path / "b", dim=48)]
    errors = np.stack([cka(run, step=0).standard_error.values for run in runs])
    expected = np.sqrt((errors**2).mean(0))
    np.testing.assert_allclose(cka(runs, step=0).standard_error, expected)


def test_a_run_of_sketches_states_its_error(tmp_path: Path) -> None:
    sketches = _write_sketches(tmp_path / "sketches")
    grams = _write(tmp_path / "grams", {0: {n: v @ v.T for n, v in _layers().items()}}, "gram")
    exact = cka(grams, step=0)
    found = cka(sketches, step=0)
    assert "unbiased" not in found.attrs["estimator"]
    assert "corrected for the sketch" in found.attrs["estimator"]
    np.testing.assert_allclose(np.diagonal(found), 1)
    np.testing.assert_allclose(np.diagonal(found.standard_error), 0, atol=1e-7)
    assert bool((abs(found - exact) <= 2 * found.standard_error + 1e-9).all())
    mixed = cka(sketches, grams, step=0)
    assert bool((abs(mixed - exact) <= 2 * mixed.standard_error).all())
    assert "standard_error" not in exact.coords
    over = cka_over_steps(sketches, reference=0)
    np.testing.assert_allclose(over.sel(step=0), 1)
    expected = np.diagonal(cka(sketches, step=5, other_step=0))
    np.testing.assert_allclose(over.sel(step=5), expected)
    assert bool((over.standard_error.sel(step=5) > 0).all())


def test_a_whole_gram_is_cut_into_the_blocks_of_the_other_side(tmp_path: Path) -> None:
    x, y = _layers()["x"], _layers()["other"]
    sizes = [16, 16, 8]
    ends = np.cumsum(sizes)
    pieces = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def blocks(values: Array) -> Array:
        return np.concatenate([(values[at] @ values[at].T).ravel() for at in pieces])

    attributes = {"block_sizes": sizes}
    in_blocks = _write(tmp_path / "a", {0: {"fc": blocks(x)}}, "gram_blocks", attributes)
    both = _write(tmp_path / "b", {0: {"fc": blocks(y)}}, "gram_blocks", attributes)
    whole = _write(tmp_path / "c", {0: {"fc": y @ y.T}}, "gram")
    np.testing.assert_allclose(cka(in_blocks, whole), cka(in_blocks, both))
    np.testing.assert_allclose(cka(whole, in_blocks), cka(both, in_blocks))
    small = _write(tmp_path / "d", {0: {"fc": np.eye(20)}}, "gram")
    with pytest.raises(MismatchError, match=r"blocks of \[20\] examples, but"):
        cka(in_blocks, small)


def test_lists_and_paths_are_no_runs(tmp_path: Path) -> None:
    run = _write_sketches(tmp_path / "run")
    with pytest.raises(InvalidInputError, match=r"list was given .*compares two runs: cka\(a, b\)"):
        cka(run, [run])  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"open it with sonde\.open_run"):
        cka(tmp_path / "run")  # type: ignore[arg-type]


def test_globs_that_fit_one_run_name_other_layers(tmp_path: Path) -> None:
    run = _write_sketches(tmp_path / "a")
    other = _write(tmp_path / "b", {0: {"fc": _layers()["x"][:, :8]}}, "sketch")
    with pytest.raises(LayerNotFoundError, match="name those of run 'b' by `other_layers`"):
        cka(run, other, step=0, layers="rot*")


def test_values_beyond_float16_are_called_so(tmp_path: Path) -> None:
    values = _layers()["x"].astype(np.float16)
    values[0, 0] = np.inf
    run = _write(tmp_path / "run", {0: {"fc": values}}, "full")
    with pytest.warns(RuntimeWarning) as caught:
        cka(run)
    assert len(caught) == 1
    assert "values beyond float16's largest, 65,504" in str(caught[0].message)
