from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sonde.analysis import stiffness
from sonde.analysis.stiffness import stiffness_matrices, summarize
from sonde.exceptions import InvalidInputError, LayerNotFoundError, MismatchError
from sonde.log import LogArray, LogWriter, Run, open_run
from sonde.log.format.files import write_run_file

Array = npt.NDArray[np.float64]
WriteRun = Callable[[Mapping[int, Mapping[str, Array]], npt.NDArray[Any] | None], Run]

LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2])


def _gradients(seed: int, num_examples: int = 8) -> Array:
    return np.random.default_rng(seed).standard_normal((num_examples, 3))


def _gram(seed: int) -> Array:
    gradients = _gradients(seed)
    return gradients @ gradients.T


def _cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _slow_class_matrix(gradients: Array, labels: npt.NDArray[Any], *, sign: bool) -> Array:
    """The definition, pair by pair."""
    pairs: dict[tuple[int, int], list[float]] = {}
    for i, a in enumerate(gradients):
        for j, b in enumerate(gradients):
            if i != j and a.any() and b.any():
                value = float(np.sign(a @ b)) if sign else _cosine(a, b)
                pairs.setdefault((labels[i], labels[j]), []).append(value)
    classes = np.unique(labels)
    means = [[np.mean(pairs.get((a, b), [np.nan])) for b in classes] for a in classes]
    return np.array(means, dtype=np.float64)


@given(
    seed=st.integers(0, 2**32 - 1),
    labels=st.lists(st.integers(0, 3), min_size=8, max_size=8),
    zero=st.sampled_from([[], [0], [2, 5]]),
)
def test_class_matrices_equal_a_loop_over_pairs(
    seed: int, labels: list[int], zero: list[int]
) -> None:
    gradients = _gradients(seed)
    gradients[zero] = 0
    sign, cosine = stiffness_matrices(gradients @ gradients.T)
    for pairs, is_sign in ((sign, True), (cosine, False)):
        expected = _slow_class_matrix(gradients, np.array(labels), sign=is_sign)
        actual = summarize(pairs, np.array(labels)).class_matrix
        np.testing.assert_allclose(actual, expected, atol=1e-12)


def test_overall_is_the_mean_over_pairs_of_different_examples() -> None:
    pairs = np.arange(16, dtype=np.float64).reshape(4, 4)
    assert summarize(pairs, np.zeros(4)).overall == np.mean(pairs[~np.eye(4, dtype=bool)])


def test_between_weighs_pairs_of_classes_equally() -> None:
    # Classes of 4, 2 and 2 examples; all pairs of a pair of classes have the same value.
    values = np.array([[0.9, 0.1, 0.2], [0.1, 0.8, 0.6], [0.2, 0.6, 0.7]])
    actual = summarize(values[np.ix_(LABELS, LABELS)], LABELS)
    assert actual.between == pytest.approx((0.1 + 0.2 + 0.6) / 3)


def test_within_weighs_classes_equally() -> None:
    values = np.diag([0.9, 0.8, 0.7])
    actual = summarize(values[np.ix_(LABELS, LABELS)], LABELS)
    assert actual.within == pytest.approx((0.9 + 0.8 + 0.7) / 3)


def test_a_class_with_one_example_is_left_out_of_within() -> None:
    labels = np.array([0, 0, 1])
    actual = summarize(np.full((3, 3), 0.5), labels)
    np.testing.assert_array_equal(
        [*np.diagonal(actual.class_matrix), actual.within], [0.5, np.nan, 0.5]
    )


def test_between_is_nan_for_a_single_class() -> None:
    assert np.isnan(summarize(np.eye(3), np.zeros(3)).between)


def test_an_example_has_stiffness_one_with_itself() -> None:
    sign, cosine = stiffness_matrices(_gram(0))
    np.testing.assert_allclose([np.diagonal(sign), np.diagonal(cosine)], np.ones((2, 8)))


def test_zero_and_diverged_gradients_are_masked() -> None:
    gram = _gram(0)
    gram[2], gram[:, 2] = 0, 0
    gram[5], gram[:, 5] = np.nan, np.nan
    masked = np.isnan(stiffness_matrices(gram)).all(axis=(0, 1))
    assert np.flatnonzero(masked).tolist() == [2, 5]


def test_tiny_gradients_do_not_underflow() -> None:
    expected = stiffness_matrices(_gram(0))
    np.testing.assert_allclose(stiffness_matrices(_gram(0) * 1e-300), expected, rtol=1e-10)


def test_softmax_regression_at_zero_has_a_closed_form() -> None:
    # gᵢ = (1/C - e_yᵢ) xᵢᵀ: cos(xᵢ, xⱼ) within a class, -cos(xᵢ, xⱼ) / (C - 1) between.
    x = _gradients(0)
    residuals = 1 / 3 - np.eye(3)[LABELS]
    gradients = (residuals[:, :, None] * x[:, None, :]).reshape(8, -1)
    same = LABELS[:, None] == LABELS[None, :]
    expected = np.array([[_cosine(a, b) for b in x] for a in x]) * np.where(same, 1, -1 / 2)
    _, cosine = stiffness_matrices(gradients @ gradients.T)
    np.testing.assert_allclose(cosine, expected, atol=1e-14)


@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-6, 1e6))
def test_stiffness_ignores_the_scale_of_the_loss(seed: int, scale: float) -> None:
    _, cosine = stiffness_matrices(_gram(seed))
    _, scaled = stiffness_matrices(_gram(seed) * scale**2)
    np.testing.assert_allclose(scaled, cosine, rtol=1e-10)


def test_a_gram_must_be_square() -> None:
    with pytest.raises(InvalidInputError, match=r"`gram` has shape \[2, 3\]; expected \[examples"):
        stiffness_matrices(np.ones((2, 3)))


def test_each_example_needs_a_label() -> None:
    with pytest.raises(MismatchError, match=r"`labels` has shape \[2\]; expected one for each of"):
        summarize(np.eye(3), np.zeros(2))


@pytest.fixture
def run(gradients_run: WriteRun) -> Run:
    return gradients_run(
        {0: {"conv": _gram(0), "fc": _gram(1)}, 10: {"conv": _gram(2), "fc": _gram(3)}}, LABELS
    )


def test_run_is_summarized_over_steps_and_classes(run: Run) -> None:
    result = stiffness(run)
    expected = [
        summarize(stiffness_matrices(gram)[1], LABELS).class_matrix
        for gram in (_gram(0) + _gram(1), _gram(2) + _gram(3))
    ]
    np.testing.assert_allclose(result["cosine_matrix"].values, expected)


def test_result_names_its_dimensions(run: Run) -> None:
    assert dict(stiffness(run).sizes) == {"step": 2, "class": 3, "other_class": 3}


def test_result_holds_both_kinds_and_counts(run: Run) -> None:
    assert set(stiffness(run).data_vars) == {
        *("sign", "sign_within", "sign_between", "sign_matrix"),
        *("cosine", "cosine_within", "cosine_between", "cosine_matrix"),
        *("num_zero_gradients", "num_nonfinite_gradients", "num_saturated"),
    }


def test_within_is_the_mean_diagonal_of_the_class_matrix(run: Run) -> None:
    result = stiffness(run, steps=[-1])
    diagonal = np.diagonal(result["sign_matrix"].values[0])
    assert result["sign_within"].item() == pytest.approx(diagonal.mean())


def test_one_layer_can_be_chosen(run: Run) -> None:
    expected = summarize(stiffness_matrices(_gram(2))[1], LABELS).overall
    result = stiffness(run, layer="conv", steps=[10])
    assert result["cosine"].item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("layer", "included", "left_out"),
    [
        (None, "conv.weight, fc.weight", "conv.bias (frozen)"),
        ("conv", "conv.weight", "conv.bias (frozen)"),
        ("fc", "fc.weight", ""),
    ],
)
def test_attributes_say_which_parameters_are_included(
    run: Run, layer: str | None, included: str, left_out: str
) -> None:
    attributes = stiffness(run, layer=layer).attrs
    assert (attributes["parameters"], attributes["parameters_left_out"]) == (included, left_out)


def test_classes_can_be_grouped(run: Run) -> None:
    result = stiffness(run, by={0: "animal", 1: "thing", 2: "thing"}, steps=[0])
    groups = np.array(["animal"] * 4 + ["thing"] * 4)
    expected = summarize(stiffness_matrices(_gram(0) + _gram(1))[0], groups).class_matrix
    np.testing.assert_allclose(
        result["sign_matrix"].sel({"class": ["animal", "thing"]}).values[0], expected
    )


def test_without_classes_only_the_overall_mean_is_left(gradients_run: WriteRun) -> None:
    result = stiffness(gradients_run({0: {"fc": _gram(0)}}, None), by=None)
    assert set(result.data_vars) == {
        *("sign", "cosine", "num_zero_gradients", "num_nonfinite_gradients", "num_saturated")
    }


def test_zero_gradients_are_counted(gradients_run: WriteRun) -> None:
    gram = _gram(0)
    gram[2], gram[:, 2] = 0, 0
    result = stiffness(gradients_run({0: {"fc": _gram(0)}, 5: {"fc": gram}}, LABELS))
    assert result["num_zero_gradients"].values.tolist() == [0, 1]


def test_diverged_gradients_are_left_out_with_a_warning(gradients_run: WriteRun) -> None:
    gram = _gram(0)
    gram[2], gram[:, 2] = np.nan, np.nan
    run = gradients_run({0: {"fc": _gram(0)}, 5: {"fc": gram}}, LABELS)
    with pytest.warns(RuntimeWarning, match=r"run 'run' has non-finite gradients at steps \[5\]"):
        result = stiffness(run)
    assert result["num_nonfinite_gradients"].values.tolist() == [0, 1]


def test_an_unknown_grouping_is_refused(run: Run) -> None:
    with pytest.raises(InvalidInputError, match=r"`by` \(='layer'\) must be 'class', a mapping"):
        stiffness(run, by="layer")  # type: ignore[arg-type]  # The error under test.


def test_a_grouping_must_cover_all_classes(run: Run) -> None:
    with pytest.raises(InvalidInputError, match=r"no superclass for classes \[1, 2\] of source"):
        stiffness(run, by={0: 0})


def test_classes_need_targets(gradients_run: WriteRun) -> None:
    run = gradients_run({0: {"fc": _gram(0)}}, None)
    with pytest.raises(InvalidInputError, match="'probe' of run 'run' has no targets; pass by=No"):
        stiffness(run)


@pytest.mark.parametrize("targets", [np.linspace(0, 1, 8), np.ones((8, 2), dtype=np.int64)])
def test_classes_need_one_label_per_example(
    gradients_run: WriteRun, targets: npt.NDArray[Any]
) -> None:
    run = gradients_run({0: {"fc": _gram(0)}}, targets)
    with pytest.raises(InvalidInputError, match="not one class label per example; pass by=None"):
        stiffness(run)


def test_an_unknown_layer_is_refused(run: Run) -> None:
    with pytest.raises(LayerNotFoundError, match=r"'fc9'.*conv, fc"):
        stiffness(run, layer="fc9")


def test_each_step_of_a_training_has_examples_and_classes_of_its_own(tmp_path: Path) -> None:
    labels = {0: np.array([0, 0, 1, 1, 1, 0, 1, 0]), 10: np.array([2, 2, 0, 0, 0, 2, 2, 0])}
    dims = ("example", "other_example")
    write_run_file(tmp_path, {"measures": []})
    writer = LogWriter(tmp_path, seal=False)
    for step, targets in labels.items():
        arrays = [
            LogArray("gram_total", _gram(step), dims),
            LogArray("target", targets, ("example",)),
        ]
        writer.append("example_gradients", "training", step, arrays)
    writer.close()
    result = stiffness(open_run(tmp_path))
    assert list(result["class"]) == [0, 1, 2]
    for step, targets in labels.items():
        classes = np.unique(targets)
        expected = _slow_class_matrix(_gradients(step), targets, sign=False)
        matrix = result.cosine_matrix.sel(step=step)
        np.testing.assert_allclose(
            matrix.sel({"class": classes, "other_class": classes}), expected, atol=1e-12
        )
        assert np.isnan(matrix).sum() == 5


def _run_with_head(path: Path, head: str | None, saturated: dict[int, list[int]]) -> Run:
    write_run_file(path, {"measures": []})
    writer = LogWriter(path, seal=False)
    writer.add_table("probe", [LogArray("target", LABELS, ("example",))])
    for step, rows in saturated.items():
        mask = np.isin(np.arange(8), rows)
        arrays = [LogArray("gram_total", _gram(step), ("example", "other_example"))]
        if head is not None:
            arrays.append(LogArray("is_saturated", mask, ("example",)))
        attributes = {} if head is None else {"head": head}
        writer.append("example_gradients", "probe", step, arrays, attributes)
    writer.close()
    return open_run(path)


def test_saturated_examples_of_a_float64_head_are_counted(tmp_path: Path) -> None:
    result = stiffness(_run_with_head(tmp_path, "float64", {0: [], 10: [1, 4, 5]}))
    assert result["num_saturated"].values.tolist() == [0, 3]
    assert result.attrs["head"] == "float64"


def test_saturated_examples_of_another_head_are_warned_of(tmp_path: Path) -> None:
    run = _run_with_head(tmp_path, "the training's own", {0: [], 10: [1, 4], 20: [1]})
    with pytest.warns(RuntimeWarning, match=r"saturated examples, up to 25% at step 10: their"):
        result = stiffness(run)
    assert result["num_saturated"].values.tolist() == [0, 2, 1]


def test_a_log_that_does_not_say_is_read_and_says_so(tmp_path: Path) -> None:
    result = stiffness(_run_with_head(tmp_path, None, {0: []}))
    assert np.isnan(result["num_saturated"].values).all()
    assert result.attrs["head"] == "not stated in the log"
