"""A table of models: every layer of each is recorded, right, or named as missing with a reason.

The table has the smallest member of every family of torchvision, and the kinds of models people
write themselves. What is recorded of an example is held against that example run alone, which
needs no knowledge of batch axes. What is missing is pinned, so that the table cannot shrink.
"""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sonde
from sonde.exceptions import SondeWarning
from sonde.hooks import select_layers
from tests.hooks.models import GPT, ListOfImages, Mixer, TimeFirst

pytest.importorskip("torchvision")
from torchvision import models
from torchvision.models.video.mvit import MSBlockConfig, MViT

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]

# Two batches, and neither has the size of the smaller batch that finds the axes.
NUM_EXAMPLES, BATCH_SIZE = 5, 3
STORE = sonde.Sketch(16)

NEVER = "it was never called in the forward pass"
NO_AXIS = r"no axis of its output \[[\d, ]+\] is the batch of [23]"
SELECTED = rf"{NO_AXIS}|it cannot be told which rows .*: rows were sorted or selected before it.*"
NO_TENSOR = r"its output \(tuple\) holds no tensor"


@dataclass(frozen=True)
class Row:
    """A model, how to call it, and which of its layers cannot be recorded, by glob."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    missing: dict[str, str] = field(default_factory=dict)
    is_slow: bool = False
    num_inputs: int = 1
    layers: list[Any] | None = None
    high: int | None = None

    def inputs(self) -> Inputs:
        shape = (NUM_EXAMPLES, *self.shape)
        if self.high is not None:
            return torch.randint(self.high, shape)
        tensors = tuple(torch.randn(shape) for _ in range(self.num_inputs))
        return tensors if self.num_inputs > 1 else tensors[0]


def vision(
    name: str,
    shape: tuple[int, ...],
    missing: dict[str, str] | None = None,
    *,
    is_slow: bool = False,
    num_inputs: int = 1,
    **options: Any,
) -> Row:
    """A model of torchvision, with random weights."""
    if re.search("detection|segmentation", models.get_model_builder(name).__module__):
        options["weights_backbone"] = None
    build = partial(models.get_model, name, weights=None, **options)
    return Row(name, build, shape, missing or {}, is_slow, num_inputs)


def mvit(*, second: bool) -> nn.Module:
    """A multiscale vision transformer of three blocks; the published ones take minutes."""
    kernel = [3, 3, 3]
    blocks = [
        MSBlockConfig(1, 8, 16, kernel, kernel, [1, 1, 1], [1, 4, 4]),
        MSBlockConfig(2, 16, 16, kernel, kernel, [1, 2, 2], [1, 2, 2]),
        MSBlockConfig(2, 16, 16, [], kernel, [], [1, 2, 2]),
    ]
    model: nn.Module = MViT(
        (32, 32), 4, blocks, second, False, second, second, stochastic_depth_prob=0.2
    )
    return model


DETECTION: dict[str, Any] = {"min_size": 64, "max_size": 64, "num_classes": 3}


def list_of_images() -> nn.Module:
    return ListOfImages(vision("fasterrcnn_mobilenet_v3_large_320_fpn", (), **DETECTION).build())


def time_first(kind: Callable[..., nn.Module]) -> nn.Module:
    return TimeFirst(kind(8, 5, 2, bidirectional=True))


DROPPED = {"features.*.stochastic_depth": NEVER}  # Where its probability is zero.
ATTENTION = {"*.attn.qkv": NEVER, "*.attn.proj": NEVER}  # Their weights go to a function.
AUXILIARY = {"aux[12].*": NEVER}  # In training only.
AUX_LOGITS = {"AuxLogits.*": NEVER}
EMPTY = {"stage*.branch1": NEVER}
QUANTIZED = {"features.*.skip_add.activation_post_process": NEVER}
ANCHORS = {"transform": NO_TENSOR, "anchor_generator*": NO_AXIS}
REGIONS = {  # Regions of all images stand in one axis, as many of each as their scores select.
    "transform": NO_TENSOR,
    "rpn.anchor_generator*": NO_AXIS,
    "roi_heads.box*": SELECTED,
}
IMAGE, CLIP = (3, 32, 32), (3, 2, 16, 16)
SEQUENCE = (BATCH_SIZE, 8)  # As many time steps as examples, which are not to be mixed up.

VISION = [
    vision("alexnet", (3, 64, 64)),
    vision("convnext_tiny", IMAGE),
    vision("densenet121", IMAGE),
    vision("efficientnet_b0", IMAGE, DROPPED),
    vision("efficientnet_v2_s", IMAGE, DROPPED),
    vision("googlenet", IMAGE, AUXILIARY, init_weights=False),
    vision("inception_v3", (3, 75, 75), AUX_LOGITS, init_weights=False),
    vision("maxvit_t", (3, 224, 224), is_slow=True),
    vision("mnasnet0_5", IMAGE),
    vision("mobilenet_v2", IMAGE),
    vision("mobilenet_v3_small", IMAGE),
    vision("regnet_x_400mf", IMAGE),
    vision("regnet_y_400mf", IMAGE),
    vision("resnet18", IMAGE),
    vision("resnext50_32x4d", IMAGE),
    vision("wide_resnet50_2", IMAGE),
    vision("shufflenet_v2_x0_5", IMAGE, EMPTY),
    vision("squeezenet1_1", IMAGE),
    vision("swin_t", IMAGE, ATTENTION),
    vision("swin_v2_t", IMAGE, {**ATTENTION, "*.attn.cpb_mlp.[012]": NO_AXIS}),
    vision("vgg11", IMAGE),
    vision("vgg11_bn", IMAGE),
    vision("vit_b_32", IMAGE, image_size=32),
    vision("quantized_googlenet", IMAGE, AUXILIARY, init_weights=False),
    vision("quantized_inception_v3", (3, 75, 75), AUX_LOGITS, init_weights=False),
    vision("quantized_mobilenet_v2", IMAGE, QUANTIZED),
    vision("quantized_mobilenet_v3_large", IMAGE, QUANTIZED),
    vision("quantized_resnet18", IMAGE),
    vision("quantized_shufflenet_v2_x0_5", IMAGE, EMPTY),
    vision("deeplabv3_mobilenet_v3_large", IMAGE),
    vision("fcn_resnet50", IMAGE),
    vision("lraspp_mobilenet_v3_large", IMAGE),
    vision("mc3_18", CLIP),
    vision("r2plus1d_18", CLIP),
    vision("r3d_18", CLIP),
    vision("s3d", (3, 13, 209, 209), is_slow=True),
    vision("swin3d_t", (3, 4, 32, 32), ATTENTION),
    # Their pools see the heads of all examples in one axis.
    Row("mvit_v1", partial(mvit, second=False), (3, 4, 32, 32)),
    Row("mvit_v2", partial(mvit, second=True), (3, 4, 32, 32)),
    vision("fasterrcnn_mobilenet_v3_large_320_fpn", (3, 64, 64), REGIONS, **DETECTION),
    vision("fasterrcnn_resnet50_fpn", (3, 64, 64), REGIONS, is_slow=True, **DETECTION),
    vision("fcos_resnet50_fpn", (3, 64, 64), ANCHORS, is_slow=True, **DETECTION),
    vision(
        "keypointrcnn_resnet50_fpn",
        (3, 64, 64),
        {**REGIONS, "roi_heads.keypoint*": SELECTED},
        is_slow=True,
        min_size=64,
        max_size=64,
    ),
    vision(
        "maskrcnn_resnet50_fpn",
        (3, 64, 64),
        {**REGIONS, "roi_heads.mask*": SELECTED},
        is_slow=True,
        **DETECTION,
    ),
    vision("retinanet_resnet50_fpn", (3, 64, 64), ANCHORS, is_slow=True, **DETECTION),
    vision("ssd300_vgg16", IMAGE, ANCHORS, is_slow=True, num_classes=3, topk_candidates=9),
    vision("ssdlite320_mobilenet_v3_large", IMAGE, ANCHORS, is_slow=True, num_classes=3),
    Row(
        "fasterrcnn of a list",
        list_of_images,
        (3, 64, 64),
        {f"model.{name}": reason for name, reason in REGIONS.items()},
    ),
    vision(
        "raft_small",
        (3, 128, 128),
        {"corr_block": NEVER},
        is_slow=True,
        num_inputs=2,
    ),
]

KINDS = [
    Row(
        "transformer",
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True),
        SEQUENCE,
        num_inputs=2,
    ),
    Row(
        "transformer, time first",
        lambda: TimeFirst(nn.Transformer(8, 2, 1, 1, 16)),
        SEQUENCE,
        num_inputs=2,
    ),
    *(
        row
        for kind in (nn.RNN, nn.LSTM, nn.GRU)
        for row in (
            Row(kind.__name__, partial(kind, 8, 5, 2, batch_first=True), SEQUENCE),
            Row(f"{kind.__name__}, time first", partial(time_first, kind), SEQUENCE),
        )
    ),
    Row("GPT", GPT, (6,), {"wpe": NO_AXIS}, high=11),
    Row("MLP-Mixer", Mixer, (3, 8, 8)),
    Row(
        "attention",
        lambda: nn.MultiheadAttention(8, 2, batch_first=True),
        SEQUENCE,
        num_inputs=3,
    ),
    Row(
        "attention, chosen by type",
        lambda: TimeFirst(nn.MultiheadAttention(8, 2)),
        SEQUENCE,
        num_inputs=3,
        layers=[nn.MultiheadAttention],
    ),
]


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    """These models are small: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "row" in metafunc.fixturenames:
        rows = VISION
        if not metafunc.config.getoption("--full"):
            rows = random.Random(0).sample([row for row in VISION if not row.is_slow], 7)
        rows = [*rows, *KINDS]
        metafunc.parametrize("row", rows, ids=lambda row: row.name)


def leaves(output: Any, way: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name the tensors of an output by the way to them."""
    if isinstance(output, Tensor):
        yield way, output
    elif isinstance(output, dict):
        for key, item in output.items():
            yield from leaves(item, f"{way}[{key}]")
    elif isinstance(output, tuple | list):
        for position, item in enumerate(output):
            yield from leaves(item, f"{way}[{position}]")


def outputs_of(
    model: nn.Module, layers: dict[str, nn.Module], inputs: Inputs, rows: slice
) -> dict[str, Any]:
    """Run a model on some examples; return the sketch of each call's output, taken as one row."""
    sketches: dict[str, Any] = {}
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    calls: Counter[str] = Counter()

    def take(name: str, output: Any) -> None:
        number = calls[name]
        calls[name] += 1
        found = list(leaves(output))
        for way, tensor in found if len(found) != 1 else [("", found[0][1])]:
            row = tensor.reshape(1, -1).float()
            key = f"{name}#{number}{way}" if number else name + way
            sketches[key] = STORE.project(row).numpy()
        if not found:
            sketches[name] = None

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: take(name, output))
        for name, module in layers.items()
    ]
    # The fused path of transformer layers calls none of their parts.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            model.eval()(*(x[rows].clone() for x in given))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        for handle in handles:
            handle.remove()
    return sketches


def recorded(path: Path, model: nn.Module, row: Row, inputs: Inputs) -> sonde.Run:
    """Record a model once; nothing but sonde may warn, and only of what is missing."""
    measure = sonde.Activations(sonde.Probe(inputs, batch_size=BATCH_SIZE), row.layers, STORE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recorder = sonde.Recorder(path, model, [measure], on_error="raise")
        recorder.measure()
        recorder.close()
    assert [w.category for w in caught] == [SondeWarning] * bool(row.missing)
    assert all("lacks" in str(w.message) for w in caught)
    return sonde.open_run(path)


# PyTorch's own word on a time-first encoder; it is not trained here.
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_every_layer_is_recorded_or_has_a_reason(
    row: Row, tmp_path: Path, counts: Counter[str]
) -> None:
    torch.manual_seed(0)
    model, inputs = row.build(), row.inputs()
    attention = {n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    layers = {
        name: module
        for name, module in model.named_modules()
        if name in attention
        or (next(module.children(), None) is None and name.rpartition(".")[0] not in attention)
    }
    if row.layers is None:
        assert list(select_layers(model)) == list(layers)
    else:
        layers = select_layers(model, row.layers)
    run = recorded(tmp_path / "run", model, row, inputs)

    reasons = {note["name"]: note["reason"] for note in run.notes if note["event"] == "missing"}
    taken = {name: [g for g in row.missing if fnmatchcase(name, g)] for name in reasons}
    assert {name: globs for name, globs in taken.items() if len(globs) != 1} == {}
    assert {glob for globs in taken.values() for glob in globs} == set(row.missing)
    for name, (glob,) in taken.items():
        assert re.fullmatch(row.missing[glob], reasons[name]), (name, reasons[name])

    expected = outputs_of(model, layers, inputs, slice(BATCH_SIZE))
    called = {re.split(r"[#\[]", name)[0] for name in expected}
    assert set(run.layers) | set(reasons) == set(expected) | (set(layers) - called)
    assert set(run.layers) & set(reasons) == set()
    sketches = {name: run.activations[name].array("sketch") for name in run.layers}
    assert {values.shape for values in sketches.values()} <= {(NUM_EXAMPLES, 16)}
    assert [name for name, values in sketches.items() if not np.isfinite(values).all()] == []
    for example in (0, NUM_EXAMPLES - 1):
        alone = outputs_of(model, layers, inputs, slice(example, example + 1))
        for name, values in sketches.items():
            error = np.linalg.norm(values[example] - alone[name][0])
            # Kernels of other batch sizes sum in other orders, layer after layer.
            assert error <= 1e-3 * np.linalg.norm(alone[name][0]) + 1e-6, name
    counts["outputs of layers of known models, recorded right"] += len(run.layers)
    counts["outputs of layers of known models, missing for a pinned reason"] += len(reasons)


def test_the_table_has_every_family_of_torchvision() -> None:
    families = {models.get_model_builder(name).__module__ for name in models.list_models()}
    names = {row.name for row in VISION} & set(models.list_models())
    covered = {models.get_model_builder(name).__module__ for name in names} | {MViT.__module__}
    assert families - covered == set()
    assert (len(VISION), len(KINDS)) == (49, 12)
