"""A recorded training is the training without sonde, to the last bit.

Both start from the same seeds. The loop draws from every generator there is, and every step is
due, so that whatever a measure disturbs is in the weights soon.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sonde
from sonde.hooks import TRAINING, Measure, Recording, Subject
from sonde.hooks.measures.base import ProbeMeasure
from tests.hooks import devices  # noqa: F401 # It prepares cuBLAS.
from tests.hooks.models import GPT, CallCount, LSTMClassifier
from tests.machine import needs_bfloat16_lstm

models = pytest.importorskip("torchvision").models

NUM_STEPS, BATCH_SIZE, NUM_EXAMPLES = 3, 4, 12


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Task:
    """A model and the data it is trained on: floats, or tokens where `num_tokens` is given."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_tokens: int | None = None
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        size = (NUM_EXAMPLES, *self.shape)
        if self.num_tokens is not None:
            tokens = torch.randint(self.num_tokens, size, generator=generator)
            return tokens, tokens.roll(-1, 1)
        return torch.randn(size, generator=generator), torch.arange(NUM_EXAMPLES) % 5


@dataclass(frozen=True)
class Mode:
    """How a step is computed."""

    num_micro_batches: int = 1
    autocast: bool = False
    steps_in_autocast: bool = False
    checkpointing: str | None = None
    backend: str | None = None
    device: str = "cpu"


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        CallCount(),
        nn.Linear(16, 5),
    )


def vit() -> nn.Module:
    model: nn.Module = models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16,
        dropout=0.1, num_classes=5,
    )  # fmt: skip
    head = model.get_submodule("heads.head")
    nn.init.normal_(cast(nn.Linear, head).weight)  # It is zero, and stops all gradients.
    return model


TASKS = {
    "MLP": Task(mlp, (6,)),
    "resnet18": Task(partial(models.resnet18, num_classes=5), (3, 32, 32)),
    "ViT": Task(vit, (3, 16, 16)),
    "GPT": Task(GPT, (6,), num_tokens=11, loss=token_loss),
    "LSTM": Task(LSTMClassifier, (7, 4)),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "LBFGS": partial(torch.optim.LBFGS, lr=0.1, max_iter=3),
}
MODES = {
    "plain": Mode(),
    "accumulation": Mode(num_micro_batches=2),
    "autocast": Mode(autocast=True),
    "step in autocast": Mode(autocast=True, steps_in_autocast=True),
    "reentrant checkpoints": Mode(checkpointing="reentrant"),
    "checkpoints": Mode(checkpointing="not reentrant"),
    "aot_eager": Mode(backend="aot_eager"),
    "inductor": Mode(backend="inductor"),
    "GPU": Mode(device="cuda"),
    "GPU, accumulation": Mode(device="cuda", num_micro_batches=2),
    "GPU, half precision": Mode(device="cuda", autocast=True),
}


def probe_measures(task: Task) -> list[Measure]:
    inputs, targets = task.data()
    probe = sonde.Probe(inputs[:5], targets[:5], batch_size=3)
    return [
        sonde.Activations(probe),
        sonde.ExampleGradients(probe, task.loss),
        sonde.Predictions(probe),
    ]


MEASURES: dict[str, Callable[[Task], list[Measure]]] = {
    "on a probe": probe_measures,
    "of the training": lambda _: [
        sonde.Activations(TRAINING),
        sonde.OutputGradients(TRAINING),
        sonde.ExampleGradients(TRAINING),
    ],
}


@dataclass
class Trace:
    """What a training left: a digest of everything by name, so that a difference is named."""

    digests: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            flat = value.detach().cpu().reshape(-1).contiguous()
            bits = flat.view(torch.uint8).numpy().tobytes()
            text = f"{value.dtype}{list(value.shape)}".encode() + bits
        elif isinstance(value, dict):
            for key, item in value.items():
                self.add(f"{name}.{key}", item)
            return
        elif isinstance(value, list | tuple) and any(isinstance(v, Tensor | dict) for v in value):
            self.add(name, dict(enumerate(value)))
            return
        else:
            text = repr(value).encode()
        self.digests[name] = hashlib.sha256(text).hexdigest()

    def differences(self, other: Trace) -> list[str]:
        names = {**self.digests, **other.digests}
        return [n for n in names if self.digests.get(n) != other.digests.get(n)]


def train(
    task: Task,
    mode: Mode,
    make_optimizer: Callable[[Any], torch.optim.Optimizer],
    record: Callable[[nn.Module, torch.optim.Optimizer], sonde.Recorder] | None = None,
) -> Trace:
    """Train from fixed seeds, and keep a trace."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    inner = task.build().to(mode.device)
    is_on_gpu = mode.device == "cuda"
    if isinstance(inner, GPT):
        inner.checkpointing = mode.checkpointing
    torch._dynamo.reset()
    model: Any = inner if mode.backend is None else torch.compile(inner, backend=mode.backend)
    optimizer = make_optimizer(inner.parameters())
    recorder = None if record is None else record(model, optimizer)
    trace = Trace()
    inputs, targets = (tensor.to(mode.device) for tensor in task.data())
    # It scales losses, and leaves out steps, only where gradients have half precision.
    scaler = torch.amp.GradScaler(
        "cuda", init_scale=1024.0, enabled=is_on_gpu and mode.autocast
    )  # From a larger one the first steps would be left out.

    def autocast(*, enabled: bool) -> Any:
        dtype = torch.float16 if is_on_gpu else torch.bfloat16
        return torch.autocast(mode.device, dtype) if enabled else nullcontext()

    def outputs_of(batch: Tensor) -> Tensor:
        if mode.checkpointing is None or not batch.is_floating_point():
            return torch.as_tensor(model(batch))
        batch.requires_grad_()  # Else a reentrant checkpoint has no gradient.
        is_reentrant = mode.checkpointing == "reentrant"
        return torch.as_tensor(checkpoint(model, batch, use_reentrant=is_reentrant))

    def closure() -> float:
        optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            with autocast(enabled=mode.autocast):
                given = inputs[batch].clone()
                if given.is_floating_point():
                    given += float(np.random.randn()) * 0.1 + random.random() * 0.1
                loss = task.loss(outputs_of(given), targets[batch]) / len(batches)
            if recorder is not None:
                recorder.batch(ids=batch, targets=targets[batch], loss=loss)
            scaler.scale(loss).backward()
            total += loss.item()
        losses.append(total)
        return total

    for step in range(NUM_STEPS):
        losses: list[float] = []
        batches = torch.randperm(NUM_EXAMPLES)[: BATCH_SIZE * mode.num_micro_batches].chunk(
            mode.num_micro_batches
        )
        with autocast(enabled=mode.steps_in_autocast):
            if scaler.is_enabled():
                closure()
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step(closure)
        trace.add(f"losses of step {step}", losses)
    if recorder is not None:
        recorder.close()
    trace.add("state", dict(inner.state_dict()))
    trace.add("gradient", {name: p.grad for name, p in inner.named_parameters()})
    trace.add("optimizer", optimizer.state_dict())
    trace.add("modes", [module.training for module in inner.modules()])
    trace.add("hooks", [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in inner.modules()])
    trace.add("scaler", scaler.state_dict())
    trace.add("random.torch", torch.get_rng_state())
    if is_on_gpu:
        trace.add("random.cuda", torch.cuda.get_rng_state())
    trace.add("random.numpy", [str(part) for part in np.random.get_state()])
    trace.add("random.python", random.getstate())
    return trace


@cache
def bare(task: str, optimizer: str, mode: str) -> Trace:
    return train(TASKS[task], MODES[mode], OPTIMIZERS[optimizer])


def recorded(
    task: str, optimizer: str, mode: str, measures: Sequence[Measure], path: Path
) -> Trace:
    def record(model: nn.Module, optimizer: torch.optim.Optimizer) -> sonde.Recorder:
        recorder = sonde.Recorder(path, model, measures, when=sonde.every(1), on_error="raise")
        return recorder.attach(optimizer)

    return train(TASKS[task], MODES[mode], OPTIMIZERS[optimizer], record)


def cases(*, is_full: bool) -> Iterator[tuple[str, str, str]]:
    """Every task with every optimizer, and with every mode; in full, all with all."""
    slow = itertools.product(["resnet18"], OPTIMIZERS, MODES)
    skipped = set(slow) - {("resnet18", "SGD", "plain"), ("resnet18", "Adam", "autocast")}
    on_gpu = [mode for mode, options in MODES.items() if options.device == "cuda"]
    yield from itertools.product(TASKS, ["Adam"], on_gpu)
    on_cpu = [mode for mode in MODES if mode not in on_gpu]
    for case in itertools.product(TASKS, OPTIMIZERS, on_cpu):
        _, optimizer, mode = case
        is_everyday = (mode == "plain" or optimizer == "Adam") and mode != "inductor"
        if is_full or (is_everyday and case not in skipped):
            yield case


@pytest.fixture(autouse=True)
def _on_one_thread() -> Iterator[None]:
    """These models are small: threads would only wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        chosen = list(cases(is_full=metafunc.config.getoption("--full")))
        metafunc.parametrize("case", chosen, ids=", ".join)


@pytest.fixture(scope="session")
def inductor() -> None:
    """Skip where inductor finds no compiler that works."""
    try:
        torch.compile(lambda x: x.sin() + 1, backend="inductor")(torch.ones(8))
    except Exception as error:
        pytest.skip(f"inductor compiles nothing here: {type(error).__name__}: {error}")


@pytest.fixture
def gpu() -> Iterator[None]:
    """Compute the same twice; skip where there is no GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# What a rule for gradients or a layer lacks is none of this file's business; the second is
# Dynamo's own look at inputs, with or without a recorder.
@pytest.mark.filterwarnings("ignore::sonde.exceptions.SondeWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
@pytest.mark.parametrize("kind", MEASURES)
def test_a_recorded_training_is_bit_identical(
    case: tuple[str, str, str],
    kind: str,
    tmp_path: Path,
    counts: Counter[str],
    request: pytest.FixtureRequest,
) -> None:
    task, optimizer, mode = case
    if mode == "inductor":
        request.getfixturevalue("inductor")
    if MODES[mode].device == "cuda":
        request.getfixturevalue("gpu")
    if task == "LSTM" and MODES[mode].autocast and MODES[mode].device == "cpu":
        needs_bfloat16_lstm()
    measures = MEASURES[kind](TASKS[task])
    is_live = any(measure.training is not None for measure in measures)
    trace = recorded(task, optimizer, mode, measures, tmp_path / "run")
    # In band a due step runs eagerly, and what inductor compiles rounds and draws in its own way.
    compared = "plain" if is_live and mode == "inductor" else mode
    assert trace.differences(bare(task, optimizer, compared)) == []
    run = sonde.open_run(tmp_path / "run")
    if is_live and mode == "reentrant checkpoints" and task != "GPT":
        # The whole model runs in one checkpoint, and in its first pass without gradients.
        assert run.measures == []
        reasons = {note["reason"] for note in run.notes if note["event"] == "missing"}
        assert reasons == {"no gradient came back to a forward pass between this step and the next"}
    else:
        for measure in measures:
            num_due = NUM_STEPS + 1 if measure.training is None else NUM_STEPS
            assert run.steps(measure.name) == list(range(num_due))
    counts["trainings compared bit by bit"] += 1


class Disturbing(ProbeMeasure):
    """A measure that changes what is not its own."""

    name = "disturbing"

    def __init__(self, disturb: Callable[[nn.Module], object]) -> None:
        super().__init__(torch.zeros(1, 1))
        self._disturb = disturb

    def describe(self) -> dict[str, Any]:
        return {}

    def record(self, subject: Subject) -> Recording:
        self._disturb(subject.model)
        return Recording()


def nudge(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.copy_(tensor.nextafter(tensor + 1))


DISTURBANCES: dict[str, tuple[Callable[[Any], object], str]] = {
    "draws from torch": (lambda _: torch.rand(1), "random.torch"),
    "draws from numpy": (lambda _: np.random.rand(), "random.numpy"),
    "draws from python": (lambda _: random.random(), "random.python"),
    "changes the last bit of a weight": (lambda m: nudge(m[0].weight), "state.0.weight"),
    "changes the last bit of a buffer": (
        lambda m: nudge(m[1].running_mean),
        "state.1.running_mean",
    ),
    "changes the last bit of a gradient": (
        lambda m: None if m[0].weight.grad is None else nudge(m[0].weight.grad),
        "gradient.0.weight",
    ),
    "leaves a layer in eval mode": (lambda m: m[3].eval(), "modes"),
    "leaves a hook": (lambda m: m[0].register_forward_hook(lambda *_: None), "hooks"),
}


@pytest.mark.parametrize("name", DISTURBANCES)
def test_the_comparison_names_what_a_measure_disturbs(name: str, tmp_path: Path) -> None:
    disturb, place = DISTURBANCES[name]
    trace = recorded("MLP", "Adam", "plain", [Disturbing(disturb)], tmp_path / "run")
    assert place in trace.differences(bare("MLP", "Adam", "plain"))
