"""Principal components of layers, against the singular value decomposition of the features."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA

from sonde.analysis import cka, components, kernels, plots
from sonde.analysis.arrays.components import participation_ratio, principal, without_components
from sonde.exceptions import InvalidInputError
from sonde.log import Run, open_run
from sonde.log.format.files import write_run_file

mpl.use("Agg")

Array = npt.NDArray[np.float64]
WriteRun = Callable[[str, Mapping[int, Mapping[str, Array]], npt.NDArray[np.int64] | None], Run]

N = 24
IDS = np.arange(N) + 300
LAYERS = ("conv", "block", "fc")


def features(seed: int) -> dict[str, Array]:
    """Layers far from zero; examples 5 and 9 dominate the second and third."""
    generator = np.random.default_rng(seed)
    made = {name: generator.normal(size=(N, 6)) * [3, 2, 1, 1, 1, 1] + 10 for name in LAYERS}
    direction = generator.normal(size=6)
    for name in LAYERS[1:]:
        made[name][5] += 30 * direction
        made[name][9] += 20 * direction
    return made


def grams(seed: int) -> dict[str, Array]:
    return {name: kernels.linear_gram(x) for name, x in features(seed).items()}


def first(x: Array) -> Array:
    u, _, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    vector: Array = u[:, 0]
    vector *= np.sign(vector[np.abs(vector).argmax()])
    return vector


@pytest.fixture
def run(activations_run: WriteRun) -> Run:
    return activations_run("seed0", {0: grams(0)}, IDS)


def test_shares_of_variance_are_those_of_a_library(run: Run) -> None:
    found = components(run, num_components=4)
    for name, x in features(0).items():
        expected = PCA(4).fit(x).explained_variance_ratio_
        np.testing.assert_allclose(found["variance_share"].sel(layer=name), expected, rtol=1e-9)


def test_the_participation_ratio_is_that_of_the_covariance(run: Run) -> None:
    found = components(run)["participation_ratio"]
    for name, x in features(0).items():
        covariance = np.cov(x.T)
        expected = np.trace(covariance) ** 2 / np.trace(covariance @ covariance)
        np.testing.assert_allclose(found.sel(layer=name), expected)


def test_first_components_and_their_alignment(run: Run, activations_run: WriteRun) -> None:
    order = np.random.default_rng(0).permutation(N)
    shuffled = {name: gram[np.ix_(order, order)] for name, gram in grams(1).items()}
    other = activations_run("seed1", {0: shuffled}, IDS[order])
    found = components(run, other)
    vectors, others = ([first(x) for x in features(seed).values()] for seed in (0, 1))
    np.testing.assert_allclose(found["score"], vectors, atol=1e-8)
    expected = (np.array(vectors) @ np.array(others).T) ** 2
    np.testing.assert_allclose(found["alignment"], expected, atol=1e-8)
    assert found["example"].values.tolist() == IDS.tolist()


def test_dominant_examples_are_named_by_id(run: Run) -> None:
    found = components(run, num_dominant=2)
    for name in ("block", "fc"):
        assert found["dominant"].sel(layer=name).values.tolist() == [305, 309]
        vector = first(features(0)[name])
        expected = np.cumsum(np.sort(vector**2)[::-1][:2])
        np.testing.assert_allclose(found["dominant_share"].sel(layer=name), expected)
    assert found["left_out"].values.tolist() == [305, 309]


def test_cka_without_components_and_without_dominant_examples(run: Run) -> None:
    found = components(run, num_dominant=2)
    np.testing.assert_allclose(found["cka"], cka(run))
    np.testing.assert_allclose(found["cka_without_component"], cka(run, remove_components=1))
    np.testing.assert_allclose(found["cka_without_dominant"], cka(run, without=[305, 309]))
    pair = found.sel(layer="block", other_layer="fc")
    # The two examples are what makes these layers alike.
    assert float(pair["cka"]) > 0.9
    assert float(pair["cka_without_dominant"]) < 0.3


def test_a_family_is_averaged_and_seeds_are_aligned(activations_run: WriteRun) -> None:
    runs = []
    for seed in range(3):
        made = activations_run(f"seed{seed}", {0: grams(seed)}, IDS)
        write_run_file(made.path, {"config": {"width": 8}})
        runs.append(open_run(made.path))
    found = components(runs, by="width")
    each = np.stack([components(run)["variance_share"].values for run in runs])
    np.testing.assert_allclose(found["variance_share"].sel(width=8), each.mean(0))
    np.testing.assert_allclose(found["variance_share_spread"].sel(width=8), each.std(0, ddof=1))
    assert "dominant" not in found
    pairs = components(runs, between=True)
    vectors = [[first(x) for x in features(seed).values()] for seed in range(3)]
    aligned = [
        (np.array(vectors[a]) @ np.array(vectors[b]).T) ** 2 for a, b in ((0, 1), (0, 2), (1, 2))
    ]
    np.testing.assert_allclose(pairs["alignment"], np.mean(aligned, axis=0), atol=1e-8)
    assert int(pairs["num_pairs"]) == 3


def test_a_layer_without_variance_has_no_components(activations_run: WriteRun) -> None:
    run = activations_run("dead", {0: grams(0) | {"conv": np.ones((N, N))}}, IDS)
    message = "components is NaN for layers of run 'dead' with no variance over the examples: 'c"
    with pytest.warns(RuntimeWarning, match=message) as caught:
        found = components(run)
    assert len(caught) == 1
    at = found.sel(layer="conv")
    assert np.isnan(at["variance_share"]).all()
    assert (at["dominant"] == -1).all()
    assert found["left_out"].values[:2].tolist() == [305, 309]


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), width=st.integers(1, 9), number=st.integers(0, 4))
def test_removing_components_leaves_the_other_eigenvalues(
    seed: int, width: int, number: int
) -> None:
    x = np.random.default_rng(seed).normal(size=(10, width))
    values, _ = principal(kernels.linear_gram(x), 1)
    left = np.linalg.eigvalsh(without_components(kernels.linear_gram(x), number))
    expected = np.sort(np.concatenate([values[number:], np.zeros(number)]))
    np.testing.assert_allclose(left, expected, atol=1e-10 * values[0])


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=8))
def test_the_participation_ratio_lies_between_one_and_all(values: list[float]) -> None:
    ratio = participation_ratio(np.array(values))
    assert 1 - 1e-9 <= ratio <= len(values) + 1e-9


def test_no_variance_has_no_participation_ratio() -> None:
    assert np.isnan(participation_ratio(np.zeros(3)))


def test_components_are_drawn(run: Run) -> None:
    found = components(run)
    figure = plots.components(found)
    titles = [axes.get_title() for axes in figure.axes[:5]]
    assert titles == [
        "5 leading components",
        "alignment of the first",
        "CKA",
        "CKA without the first",
        "CKA without dominant examples",
    ]
    bars = figure.axes[0].patches
    widths = np.array([bar.get_width() for bar in bars]).reshape(5, 3)  # type: ignore[attr-defined]
    np.testing.assert_allclose(widths.T, found["variance_share"])
    _, axes = plt.subplots()
    assert plots.components(found, ax=axes) is axes.figure
    assert len(axes.patches) == 15
    plt.close("all")
    with pytest.raises(InvalidInputError, match="choose one by"):
        plots.components(found.expand_dims("width"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_components": 0}, r"`num_components` \(=0\) and `num_dominant` \(=10\) must be at"),
        ({"by": "width"}, "`between` and `by` take several runs"),
    ],
)
def test_wrong_options_are_refused(run: Run, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        components(run, **options)  # type: ignore[arg-type]  # Some are wrong on purpose.


def test_too_few_examples_are_refused(activations_run: WriteRun) -> None:
    few = activations_run("few", {0: {"conv": np.diag([1.0, 2, 3, 4])}}, IDS[:4])
    with pytest.raises(InvalidInputError, match="leaves fewer than 4 of 4 examples"):
        components(few)
