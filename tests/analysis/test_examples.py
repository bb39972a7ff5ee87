"""Whether the examples of two runs with equal ids are the same ones."""

import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest

from sonde.analysis import cka
from sonde.exceptions import MismatchError
from sonde.log import Run

ProbedRun = Callable[..., Run]

TARGETS = np.array([0, 1, 2, 0, 1, 2, 0, 1])


def test_other_inputs_under_the_same_ids_are_warned_of(probed_run: ProbedRun) -> None:
    run, other = (probed_run(name, TARGETS, input_digest=name) for name in ("a", "b"))
    message = re.escape(
        "CKA compares 'probe' of run 'a' and 'probe' of run 'b', whose inputs differ under the "
        "same ids"
    )
    with pytest.warns(RuntimeWarning, match=message):
        cka(run, other)


def test_the_warning_says_that_ids_are_positions(probed_run: ProbedRun) -> None:
    run, other = (probed_run(n, input_digest=n, kind="positions") for n in ("a", "b"))
    with pytest.warns(RuntimeWarning, match="the ids are positions in a probe; record both runs"):
        cka(run, other)


def test_other_targets_under_the_same_ids_are_refused(probed_run: ProbedRun) -> None:
    run = probed_run("a", TARGETS)
    other = probed_run("b", np.array([0, 1, 2, 0, 1, 2, 0, 2]))
    with pytest.raises(MismatchError, match=r"same id but other targets \(id 7: 1 and 2\)"):
        cka(run, other)


def test_targets_are_compared_example_by_example(probed_run: ProbedRun) -> None:
    order = np.array([3, 1, 0, 2, 7, 6, 5, 4])
    run, other = probed_run("a", TARGETS), probed_run("b", TARGETS[order], order)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cka(run, other)
    wrong = probed_run("c", TARGETS, order)
    with pytest.raises(MismatchError, match="other targets"):
        cka(run, wrong)


def test_targets_that_are_numbers_are_compared(probed_run: ProbedRun) -> None:
    run, other = probed_run("a", TARGETS), probed_run("b", TARGETS.astype(np.float64) + 0.5)
    with pytest.raises(MismatchError, match=r"other targets \(id 0: 0 and 0.5\)"):
        cka(run, other)


def test_other_labels_of_the_same_inputs_are_compared(probed_run: ProbedRun) -> None:
    # Such as random labels beside true ones: activations do not depend on them.
    run, other = (
        probed_run(name, targets, input_digest="same")
        for name, targets in (("a", TARGETS), ("b", 2 - TARGETS))
    )
    assert cka(run, other).sel(layer="fc", other_layer="fc") == pytest.approx(1)


def test_logs_without_digests_are_compared_as_before(probed_run: ProbedRun) -> None:
    assert cka(probed_run("a"), probed_run("b")).item() == pytest.approx(1)


def test_digests_of_batches_of_other_sizes_are_said_not_to_tell(probed_run: ProbedRun) -> None:
    run = probed_run("a", input_digest="batches of 4: 01")
    other = probed_run("b", input_digest="batches of 8: 02")
    with pytest.warns(RuntimeWarning, match="whether their inputs are the same is not known"):
        cka(run, other)


def test_positions_in_probes_of_other_sizes_are_warned_of(probed_run: ProbedRun) -> None:
    run = probed_run("a", kind="positions")
    other = probed_run("b", example_ids=np.arange(4, 12), kind="positions")
    with pytest.warns(RuntimeWarning) as caught:
        cka(run, other)
    texts = [str(warning.message) for warning in caught]
    assert [text.partition(";")[0] for text in texts] == [
        "CKA on the 4 examples that run 'a' (8) and run 'b' (8) share",
        "CKA matches the examples of 'probe' of run 'a' and 'probe' of run 'b' by id, but the ids "
        "are positions in a probe",
    ]
