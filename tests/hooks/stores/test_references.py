"""Features far from zero: products and sketches keep the digits that differ between examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.analysis import cka, kernels
from sonde.hooks import Gram, Sketch, Store
from sonde.log import LogArray, MeasureLog, Run

Array = npt.NDArray[np.float64]

NUM_EXAMPLES, NUM_FEATURES = 40, 96

# What is added to features of standard deviation 1.
OFFSETS: dict[str, Callable[[int], Tensor]] = {
    "none": torch.zeros,
    "all 1e2": lambda p: torch.full((p,), 1e2),
    "all 3e3": lambda p: torch.full((p,), 3e3),
    "all 1e4": lambda p: torch.full((p,), 1e4),
    "one feature 15000": lambda p: torch.eye(p)[3] * 15_000,
    "one feature 1e6": lambda p: torch.eye(p)[3] * 1e6,
}
STORES: dict[str, Store] = {
    "gram": Gram(),
    "gram64": Gram(torch.float64),
    "blocks": Gram(block=8),
    "full": sonde.Full(),
    "small sketch": Sketch(24),
    "large sketch": Sketch(300),
}


def features_of(offset: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(NUM_EXAMPLES, NUM_FEATURES, generator=generator)
    return features + OFFSETS[offset](NUM_FEATURES)


class Layers(nn.Module):
    """A layer that puts out the features, and another with the same without what they share."""

    def __init__(self) -> None:
        super().__init__()
        self.far, self.near, self.head = nn.Identity(), nn.Identity(), nn.Linear(NUM_FEATURES, 3)

    def forward(self, features: Tensor) -> Tensor:
        return torch.as_tensor(self.head(self.near(self.far(features) / 16)))


def recorded(path: Path, features: Tensor, store: Store, **options: Any) -> Run:
    """Record features as outputs of the layers `far`, and divided by 16, as nothing rounds."""
    probe = sonde.Probe(features, batch_size=options.pop("batch_size", NUM_EXAMPLES))
    measures = [sonde.Activations(probe, ["far", "near"], store, **options)]
    with sonde.Recorder(path / "run", Layers(), measures, on_error="raise") as recorder:
        recorder.measure()
    return sonde.open_run(path / "run")


def rows_in(store: Store, features: Tensor) -> Array:
    """Return, in float64, rows whose inner products the store keeps."""
    wide = features.double()
    return (store.project(wide) if isinstance(store, Sketch) else wide).numpy()


def blocks_in(store: Store, num_examples: int = NUM_EXAMPLES) -> list[slice]:
    size = store.block if isinstance(store, Gram) and store.block else num_examples
    return [slice(start, start + size) for start in range(0, num_examples, size)]


def assert_centred_alike(log: MeasureLog, layer: str, store: Store, features: Tensor) -> None:
    """Compare with products in float64 of features less their mean: 1e-3 of all that is left."""
    rows = rows_in(store, features)
    grams = log.gram_blocks(layer, 0, relative=True)
    assert len(grams) == len(blocks_in(store, len(features)))
    for gram, block in zip(grams, blocks_in(store, len(features)), strict=True):
        centred = rows[block] - rows[block].mean(0)
        expected = centred @ centred.T
        actual = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
        assert np.linalg.norm(actual - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("batch_size", [NUM_EXAMPLES, 16])
def test_what_differs_between_examples_is_kept(
    tmp_path: Path, store: str, offset: str, batch_size: int
) -> None:
    features = features_of(offset)
    log = recorded(tmp_path, features, STORES[store], batch_size=batch_size).activations
    assert_centred_alike(log, "far", STORES[store], features)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("store", STORES)
def test_inner_products_are_those_of_the_features(tmp_path: Path, store: str, offset: str) -> None:
    features = features_of(offset)
    log = recorded(tmp_path, features, STORES[store], batch_size=16).activations
    rows = rows_in(STORES[store], features)
    blocks = blocks_in(STORES[store])
    for gram, block in zip(log.gram_blocks("far"), blocks, strict=True):
        expected = rows[block] @ rows[block].T
        largest = np.abs(expected).max()
        # Of features stored in float32 a sketch has seven digits, of products the largest term has.
        np.testing.assert_allclose(gram, expected, atol=1e-6 * largest)


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("store", ["gram", "gram64", "blocks", "full"])
def test_layers_alike_but_for_scale_have_a_cka_of_1(
    tmp_path: Path, store: str, offset: str
) -> None:
    run = recorded(tmp_path, features_of(offset), STORES[store], batch_size=16)
    for unbiased in (True, False):
        np.testing.assert_allclose(cka(run, unbiased=unbiased).values, 1, atol=1e-3)


@pytest.mark.parametrize("memory", [1 << 20, 16 * NUM_FEATURES * 4, 1])
def test_all_passes_over_a_probe_subtract_the_same(tmp_path: Path, memory: int) -> None:
    features = features_of("all 3e3")
    log = recorded(tmp_path, features, Gram(), batch_size=7, memory=memory).activations
    assert_centred_alike(log, "far", Gram(), features)
    np.testing.assert_allclose(
        log["far"].gram(), features.double() @ features.double().T, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("store", STORES)
def test_features_of_any_type_keep_what_differs(
    tmp_path: Path, store: str, dtype: torch.dtype
) -> None:
    features = (1024 + 64 * features_of("none")).to(dtype)
    model = Layers().to(dtype)
    measure = sonde.Activations(sonde.Probe(features, batch_size=16), ["far"], STORES[store])
    with sonde.Recorder(tmp_path / "run", model, [measure], on_error="raise") as recorder:
        recorder.measure()
    log = sonde.open_run(tmp_path / "run").activations
    assert_centred_alike(log, "far", STORES[store], features)


def test_ordinary_layers_are_recorded_as_before(tmp_path: Path) -> None:
    features = features_of("none")
    log = recorded(tmp_path, features, Gram()).activations
    assert log.fields("far") == ["gram"]
    assert "reference" not in log.attributes()
    assert log.array("gram", 0, "far").dtype == np.float32
    assert np.array_equal(log.array("gram", 0, "far"), features.numpy() @ features.numpy().T)


@pytest.mark.parametrize(
    ("store", "kept"), [("gram", "gram"), ("blocks", "gram_blocks"), ("large sketch", "sketch")]
)
def test_a_record_says_what_was_subtracted_and_readers_add_it_again(
    tmp_path: Path, store: str, kept: str
) -> None:
    run = recorded(tmp_path, features_of("all 3e3"), STORES[store])
    log = run.activations
    beside = "sketch_reference" if kept == "sketch" else "gram_offset"
    assert log.fields("far") == [kept, beside]
    assert log.describe()["far", kept].dtype == "float32"
    assert log.describe()["far", beside].dtype == "float64"
    assert "median of the first three examples" in log.attributes()["reference"]
    stored = log.array(kept, 0, "far", as_stored=True)
    absolute = log.array(kept, 0, "far")
    assert np.abs(stored).max() < 1e-2 * np.abs(absolute).max()
    assert absolute.dtype == np.float64
    for as_stored, expected in ((True, stored), (False, absolute)):
        stacked = log.stack(kept, None, "far", as_stored=as_stored)
        tree = run.to_xarray(as_stored=as_stored)["activations/probe"].to_dataset()
        for values in (stacked[0], tree[f"far:{kept}"].values[0]):
            assert values.dtype == expected.dtype
            assert np.array_equal(values, expected)


@pytest.mark.parametrize("at", [0, 1, 7])
@pytest.mark.parametrize("size", [15_000.0, 1e6])
@pytest.mark.parametrize("is_dead_elsewhere", [False, True])
@pytest.mark.parametrize("offset", ["none", "one feature 15000"])
def test_one_massive_activation_of_one_example_leaves_cka_right(
    tmp_path: Path, at: int, size: float, is_dead_elsewhere: bool, offset: str
) -> None:
    features = features_of(offset)
    if is_dead_elsewhere:
        features[:, 5] = 0
    features[at, 5] = size
    other = torch.randn(NUM_EXAMPLES, 9, generator=torch.Generator().manual_seed(1))
    other = other + features[:, :9].clamp(-3, 3)

    class Both(Layers):
        def forward(self, both: Tensor) -> Tensor:
            self.near(both[:, NUM_FEATURES:])
            return torch.as_tensor(self.head(self.far(both[:, :NUM_FEATURES])))

    probe = sonde.Probe(torch.cat([features, other], 1), batch_size=NUM_EXAMPLES)
    measure = sonde.Activations(probe, ["far", "near"])
    with sonde.Recorder(tmp_path / "run", Both(), [measure], on_error="raise") as recorder:
        recorder.measure()
    rows = [part.double() - part.double().mean(0) for part in (features, other)]
    expected = kernels.cka_matrix([(part @ part.T).numpy() for part in rows])
    actual = cka(sonde.open_run(tmp_path / "run")).values
    np.testing.assert_allclose(actual, expected, atol=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 9])
@pytest.mark.parametrize("store", ["gram", "blocks", "large sketch"])
def test_an_example_that_is_not_finite_spoils_no_other(
    tmp_path: Path, store: str, at: int, bad: float
) -> None:
    features = features_of("all 1e2")
    features[at, 2] = bad
    log = recorded(tmp_path, features, STORES[store]).activations
    values = np.concatenate([np.diagonal(gram) for gram in log.gram_blocks("far")])
    assert np.flatnonzero(~np.isfinite(values)).tolist() == [at]


@pytest.mark.parametrize("store", ["gram", "blocks"])
@pytest.mark.parametrize("noise", [0, 1e-7])
def test_a_layer_that_is_constant_but_for_rounding_has_no_cka(
    tmp_path: Path, store: str, noise: float
) -> None:
    constant = 0.1 + torch.rand(NUM_FEATURES, generator=torch.Generator().manual_seed(2))
    features = constant * (1 + noise * features_of("none"))
    run = recorded(tmp_path, features, STORES[store])
    with pytest.warns(RuntimeWarning, match="no variance over the examples: 'far'"):
        assert np.isnan(cka(run).values).all()


def test_a_hundred_thousand_features_are_added_up_right(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(4)
    features = torch.rand(12, 300_000, generator=generator)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.far, self.head = nn.Identity(), nn.Linear(4, 3)

        def forward(self, features: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.far(features)[:, :4]))

    measure = sonde.Activations(sonde.Probe(features), ["far"])
    with sonde.Recorder(tmp_path / "run", Wide(), [measure], on_error="raise") as recorder:
        recorder.measure()
    log = sonde.open_run(tmp_path / "run").activations
    assert_centred_alike(log, "far", Gram(), features)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("sizes", [[8, 8, 24], [1, 2, 37]])
def test_micro_batches_of_a_training_subtract_the_same(
    tmp_path: Path, store: str, sizes: list[int]
) -> None:
    features = features_of("all 3e3")
    model = Layers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0)
    measures = [sonde.Activations(sonde.TRAINING, ["far"], STORES[store])]
    with sonde.Recorder(
        tmp_path / "run", model, measures, when=sonde.every(1), on_error="raise"
    ) as recorder:
        recorder.attach(optimizer)
        for batch in features.split(sizes):
            model(batch).square().mean().backward()
        optimizer.step()
    log = sonde.open_run(tmp_path / "run").activations
    rows = rows_in(STORES[store], features)
    block_sizes = log.attributes(0).get("block_sizes", [NUM_EXAMPLES])
    ends = np.cumsum(block_sizes).tolist()
    blocks = [slice(end - size, end) for end, size in zip(ends, block_sizes, strict=True)]
    grams = log.gram_blocks("far", 0, relative=True)
    for gram, block in zip(grams, blocks, strict=True):
        centred = rows[block] - rows[block].mean(0)
        expected = centred @ centred.T
        actual = gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean()
        assert np.linalg.norm(actual - expected) <= 1e-3 * np.linalg.norm(expected)


def arrays_as_read(arrays: list[LogArray]) -> Array:
    values, *beside = (np.asarray(array.values, np.float64) for array in arrays)
    if arrays[0].field == "gram":
        return values + sum(others[:, None] + others for others in beside)
    return values + sum(beside)


@pytest.mark.parametrize("store", [Gram(), Sketch(24)], ids=["gram", "sketch"])
@pytest.mark.parametrize("offsets", [("all 3e3", "all 1e2"), ("none", "all 3e3")])
def test_parts_that_subtracted_different_references_are_joined(
    store: Gram | Sketch, offsets: tuple[str, str]
) -> None:
    features = [features_of(offset)[:20] for offset in offsets]
    parts = [store.part(of_part, is_held=True) for of_part in features]
    rows = rows_in(store, torch.cat(features))
    expected = rows @ rows.T if isinstance(store, Gram) else rows
    actual = arrays_as_read(store.join(parts, "layer"))
    np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("store", [Gram(), Sketch(24)], ids=["gram", "sketch"])
def test_parts_of_other_widths_choose_their_own_reference(store: Gram | Sketch) -> None:
    features = features_of("all 3e3")
    first = store.part(features[:20], is_held=True)
    second = store.part(features[20:, :50], is_held=True, first=first)
    assert second.reference is not first.reference
