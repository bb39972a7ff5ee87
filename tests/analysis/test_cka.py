from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import pytest

from sonde.analysis import cka, cka_over_steps, kernels
from sonde.exceptions import (
    InvalidInputError,
    LayerNotFoundError,
    MismatchError,
    StepNotFoundError,
)
from sonde.log import Run

Array = npt.NDArray[np.float64]
WriteRun = Callable[[str, Mapping[int, Mapping[str, Array]], npt.NDArray[np.int64] | None], Run]

LAYERS = ("conv.0", "conv.1", "fc")
IDS = np.arange(10, 18)


def _grams(seed: int, num_examples: int = 8) -> dict[str, Array]:
    generator = np.random.default_rng(seed)
    return {
        name: kernels.linear_gram(generator.standard_normal((num_examples, 4))) for name in LAYERS
    }


def _expected(grams: Mapping[str, Array], others: Mapping[str, Array]) -> Array:
    return kernels.cka_matrix(list(grams.values()), list(others.values()))


@pytest.fixture
def run(activations_run: WriteRun) -> Run:
    return activations_run("seed0", {0: _grams(0), 100: _grams(1)}, IDS)


def test_layers_of_one_run_are_compared_at_the_last_step(run: Run) -> None:
    np.testing.assert_allclose(cka(run).values, _expected(_grams(1), _grams(1)))


def test_result_names_layers_and_origin(run: Run) -> None:
    result = cka(run, layers="conv.*", other_layers=["fc"], other_step=0)
    assert (
        result.dims,
        result["layer"].values.tolist(),
        result["other_layer"].values.tolist(),
    ) == (
        ("layer", "other_layer"),
        ["conv.0", "conv.1"],
        ["fc"],
    )


def test_attributes_say_what_was_compared(run: Run) -> None:
    assert cka(run, step=0, other_step=-1, unbiased=False).attrs == {
        "estimator": "biased",
        "run": "seed0",
        "other_run": "seed0",
        "step": 0,
        "other_step": 100,
        "source": "probe",
        "features": "flattened (gram)",
        "other_features": "flattened (gram)",
        "num_examples": 8,
    }


def test_two_steps_of_one_run_are_compared(run: Run) -> None:
    actual = cka(run, step=0, other_step=100).values
    np.testing.assert_allclose(actual, _expected(_grams(0), _grams(1)))


def test_two_runs_are_compared(run: Run, activations_run: WriteRun) -> None:
    other = activations_run("seed1", {50: _grams(2)}, IDS)
    np.testing.assert_allclose(cka(run, other).values, _expected(_grams(1), _grams(2)))


def test_the_biased_estimator_can_be_chosen(run: Run) -> None:
    expected = kernels.cka_matrix(list(_grams(1).values()), unbiased=False)
    np.testing.assert_allclose(cka(run, unbiased=False).values, expected)


def test_the_source_can_be_named(run: Run) -> None:
    np.testing.assert_array_equal(cka(run, source="probe").values, cka(run).values)


def test_examples_in_another_order_are_aligned(run: Run, activations_run: WriteRun) -> None:
    order = np.random.default_rng(0).permutation(8)
    shuffled = {name: gram[np.ix_(order, order)] for name, gram in _grams(1).items()}
    other = activations_run("shuffled", {100: shuffled}, IDS[order])
    np.testing.assert_allclose(np.diagonal(cka(run, other).values), 1)


def test_overlapping_examples_are_compared_on_the_common_ones(
    run: Run, activations_run: WriteRun
) -> None:
    other = activations_run("seed1", {100: _grams(2)}, IDS + 3)
    common, shifted = (
        {name: gram[rows, rows] for name, gram in _grams(seed).items()}
        for seed, rows in ((1, slice(3, None)), (2, slice(None, 5)))
    )
    message = r"CKA on the 5 examples that run 'seed0' \(8\) and run 'seed1' \(8\) share"
    with pytest.warns(RuntimeWarning, match=message):
        actual = cka(run, other)
    np.testing.assert_allclose(actual.values, _expected(common, shifted))


def test_the_number_of_common_examples_is_stated(run: Run, activations_run: WriteRun) -> None:
    other = activations_run("seed1", {100: _grams(2)}, IDS + 3)
    with pytest.warns(RuntimeWarning, match="CKA on the 5 examples"):
        assert cka(run, other).attrs["num_examples"] == 5


def test_too_few_common_examples_are_refused(run: Run, activations_run: WriteRun) -> None:
    other = activations_run("seed1", {100: _grams(2)}, IDS + 5)
    with pytest.raises(MismatchError, match=r"share 3 example ids in 'probe'; expected at least 4"):
        cka(run, other)


def test_runs_without_ids_are_refused(run: Run, activations_run: WriteRun) -> None:
    other = activations_run("anonymous", {100: _grams(2)}, None)
    with pytest.raises(MismatchError, match="'probe' in run 'anonymous' records no example ids"):
        cka(run, other)


def test_one_record_needs_no_ids(activations_run: WriteRun) -> None:
    run = activations_run("anonymous", {100: _grams(1)}, None)
    np.testing.assert_allclose(cka(run).values, _expected(_grams(1), _grams(1)))


def test_repeated_ids_cannot_be_aligned(run: Run, activations_run: WriteRun) -> None:
    repeated = activations_run("repeated", {100: _grams(2)}, np.array([1, 1, 2, 3, 4, 5, 6, 7]))
    with pytest.raises(MismatchError, match="ids of 'probe' in run 'repeated' repeat"):
        cka(run, repeated)


def test_a_layer_without_variance_is_nan_and_named(activations_run: WriteRun) -> None:
    run = activations_run("seed0", {0: _grams(0) | {"dead": np.full((8, 8), 0.3)}}, IDS)
    message = "layers of run 'seed0' with no variance over the examples: 'dead' \\(step 0\\)"
    with pytest.warns(RuntimeWarning, match=message):
        result = cka(run)
    assert bool(result.sel(layer="dead").isnull().all())
    assert result.isnull().sum() == 7


def test_a_diverged_layer_is_nan_and_named(activations_run: WriteRun) -> None:
    run = activations_run("seed0", {0: _grams(0) | {"fc": np.full((8, 8), np.inf)}}, IDS)
    message = r"layers of run 'seed0' with non-finite activations: 'fc' \(step 0\)"
    with pytest.warns(RuntimeWarning, match=message):
        assert cka(run).isnull().sum() == 5


def test_a_layer_missing_at_the_step_is_nan_and_named(activations_run: WriteRun) -> None:
    late = {name: gram for name, gram in _grams(1).items() if name != "conv.0"}
    run = activations_run("seed0", {0: _grams(0), 100: late}, IDS)
    message = r"layers of run 'seed0' with no record: 'conv.0' \(step 100\)"
    with pytest.warns(RuntimeWarning, match=message):
        assert bool(cka(run).sel(layer="conv.0").isnull().all())


def test_a_step_without_any_of_the_layers_is_refused(activations_run: WriteRun) -> None:
    run = activations_run("seed0", {0: {"conv": np.eye(8)}, 100: {"fc": np.eye(8)}}, IDS)
    with pytest.raises(StepNotFoundError, match="recorded none of these layers at step 100: conv"):
        cka(run, layers="conv")


def test_too_few_examples_name_the_layer(activations_run: WriteRun) -> None:
    run = activations_run("tiny", {0: _grams(0, 3)}, IDS[:3])
    with pytest.raises(InvalidInputError, match=r"layer 'conv\.0' of run 'tiny': `gram` has 3"):
        cka(run)


def test_layers_of_different_examples_are_refused(activations_run: WriteRun) -> None:
    run = activations_run("ragged", {0: {"conv": np.eye(8), "fc": np.eye(6)}}, IDS)
    with pytest.raises(MismatchError, match="layer 'fc' of run 'ragged' has 6 examples at step 0"):
        cka(run)


def test_an_unknown_layer_lists_near_names_and_all(run: Run) -> None:
    message = (
        r"no layer of 'activations' in run 'seed0' matches 'conv\.2'; did you mean 'conv\.1', "
        r"'conv\.0'\?; layers: conv\.0, conv\.1, fc"
    )
    with pytest.raises(LayerNotFoundError, match=message):
        cka(run, layers=["conv.2"])


def test_a_glob_that_matches_nothing_is_refused(run: Run) -> None:
    with pytest.raises(LayerNotFoundError, match=r"matches 'layer\*'; layers: conv.0"):
        cka(run, layers=["fc", "layer*"])


def test_an_empty_selection_of_layers_is_refused(run: Run) -> None:
    with pytest.raises(LayerNotFoundError, match=r"no layers selected; layers: 'conv\.0'"):
        cka(run, layers=[])


def test_layers_keep_the_order_asked_for(run: Run) -> None:
    assert cka(run, layers=["fc", "*"])["layer"].values.tolist() == ["fc", "conv.0", "conv.1"]


def test_over_steps_compares_each_layer_with_itself(run: Run) -> None:
    early, late = _grams(0), _grams(1)
    expected = [[_expected({"": early[n]}, {"": late[n]})[0, 0] for n in LAYERS], [1, 1, 1]]
    np.testing.assert_allclose(cka_over_steps(run).values, expected)


def test_over_steps_takes_another_reference(run: Run) -> None:
    np.testing.assert_allclose(cka_over_steps(run, reference=0).sel(step=0).values, 1)


def test_over_steps_names_its_dimensions_and_reference(run: Run) -> None:
    result = cka_over_steps(run, layers="fc", steps=[-1])
    assert (result.dims, result["step"].values.tolist(), result.attrs["reference_step"]) == (
        ("step", "layer"),
        [100],
        100,
    )


def test_over_steps_is_nan_where_a_layer_is_missing(activations_run: WriteRun) -> None:
    early = {name: gram for name, gram in _grams(0).items() if name != "fc"}
    run = activations_run("seed0", {0: early, 50: early, 100: _grams(1)}, IDS)
    with pytest.warns(RuntimeWarning, match=r"with no record: 'fc' \(step 0, 50\)"):
        result = cka_over_steps(run)
    assert result.isnull().sum() == 2


def test_over_steps_needs_ids(activations_run: WriteRun) -> None:
    run = activations_run("anonymous", {0: _grams(0), 100: _grams(1)}, None)
    with pytest.raises(MismatchError, match="'probe' in run 'anonymous' records no example ids"):
        cka_over_steps(run)


def test_no_steps_are_refused(run: Run) -> None:
    with pytest.raises(InvalidInputError, match="`steps` is empty; expected steps, or None"):
        cka_over_steps(run, steps=[])
