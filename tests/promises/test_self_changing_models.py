"""Models that change themselves: the training is the same when the first pass of all is sonde's.

Hooks that collect hidden states, observers that calibrate themselves, counters, tables and layers
that are made late: whatever a pass of sonde's brings about has to be gone after it, or the
training's own first pass does not do it again.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sonde

transformers = pytest.importorskip("transformers")

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Task:
    """A model that changes itself, and examples for it."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]


class OfAllStates(nn.Module):
    """Computes with every hidden state and attention that a model of transformers collects."""

    def __init__(self, body: nn.Module, width: int, *, shape: str = "tokens", **options: Any):
        super().__init__()
        self.options, self.shape = options, shape
        self.body: Any = body
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.body(x, **self.options)
        states = [state.flatten(2).mean(2) for state in outputs.hidden_states[-1:]]
        if self.shape == "tokens":
            states = [state.mean(1) for state in outputs.hidden_states]
        weights = sum(attention.square().mean() for attention in outputs.attentions)
        return torch.as_tensor(self.out(sum(states)) * (1 + weights))


class T5States(OfAllStates):
    """The same for an encoder beside a decoder."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.body(input_ids=x, decoder_input_ids=x[:, :3], **self.options)
        names = ("encoder_hidden_states", "decoder_hidden_states")
        states = [state.mean(1) for name in names for state in outputs[name]]
        return torch.as_tensor(self.out(sum(states)))


def _bert() -> OfAllStates:
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
        attn_implementation="eager",
    )
    body = transformers.BertModel(config)
    return OfAllStates(body, 8, output_hidden_states=True, output_attentions=True)


def _segformer() -> nn.Module:
    config = transformers.SegformerConfig(
        num_encoder_blocks=2,
        depths=[1, 1],
        hidden_sizes=[8, 8],
        num_attention_heads=[1, 2],
        sr_ratios=[2, 1],
        patch_sizes=[3, 3],
        strides=[2, 2],
        mlp_ratios=[2, 2],
        num_channels=1,
    )
    body = transformers.SegformerModel(config)
    options = {"output_hidden_states": True, "output_attentions": True}
    return OfAllStates(body, 8, shape="maps", **options)


def _t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.1
    )
    return T5States(transformers.T5Model(config), 8, output_hidden_states=True)


def _quantized() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated, and used.
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        prepared: nn.Module = torch.ao.quantization.prepare_qat(model)
    return prepared


class Writing(nn.Module):
    """Writes to a buffer behind its version counter, and makes a table and a layer late."""

    count: Tensor
    sum: Tensor
    out: nn.Module

    def __init__(self, *, makes_layer: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("sum", torch.zeros(8))
        self.makes_layer = makes_layer

    def forward(self, x: Tensor) -> Tensor:
        self.count.data += 1
        self.sum.numpy()[:] += x.detach().numpy().sum(0)
        if not hasattr(self, "table"):
            self.table = torch.randn(8)
        if self.makes_layer and not hasattr(self, "out"):
            self.out = nn.Linear(8, 3)
        mixed = self.mix(x) + self.table + 0.01 * self.count + 0.01 * self.sum
        return torch.as_tensor(self.out(mixed) if self.makes_layer else mixed[:, :3])


def _tokens() -> Tensor:
    return torch.randint(30, (8, 5), generator=torch.Generator().manual_seed(1))


def _rows() -> Tensor:
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(1))


def _maps() -> Tensor:
    return torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))


TASKS = {
    "BERT": Task(_bert, _tokens),
    "Segformer": Task(_segformer, _maps),
    "T5": Task(_t5, _tokens),
    "quantization-aware": Task(_quantized, _rows),
    "writing": Task(lambda: Writing(makes_layer=False), _rows),
    "late layers": Task(lambda: Writing(makes_layer=True), _rows),
}
TARGETS = torch.arange(8) % 3


def _on_a_probe(inputs: Tensor) -> list[sonde.hooks.Measure]:
    # Other examples than the training's, which leave other traces.
    probe = sonde.Probe(inputs.flip(0)[:6], TARGETS[:6])
    return [
        sonde.Activations(probe),
        sonde.ExampleGradients(probe, F.cross_entropy),
        sonde.Predictions(probe),
    ]


def _in_band(_: Tensor) -> list[sonde.hooks.Measure]:
    return [
        sonde.Activations(sonde.TRAINING),
        sonde.ExampleGradients(sonde.TRAINING),
        sonde.OutputGradients(sonde.TRAINING),
    ]


MEASURES: dict[str, Callable[[Tensor], list[sonde.hooks.Measure]]] = {
    "activations": lambda inputs: _on_a_probe(inputs)[:1],
    "gradients": lambda inputs: _on_a_probe(inputs)[1:2],
    "predictions": lambda inputs: _on_a_probe(inputs)[2:],
    "in band": _in_band,
    "all": lambda inputs: [*_on_a_probe(inputs), *_in_band(inputs)],
}


def _parts(model: nn.Module) -> dict[str, Any]:
    """What has to be the same of two trainings."""
    parts: dict[str, Any] = {name: t.numpy().tobytes() for name, t in model.state_dict().items()}
    for name, module in model.named_modules():
        for table in _HOOKS:
            parts[f"{name}.{table}"] = len(vars(module)[table])
    return parts


def _trained(task: Task, path: Path, measures: list[sonde.hooks.Measure]) -> dict[str, Any]:
    torch.manual_seed(0)
    model, inputs = task.build(), task.inputs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    recorder = None
    if measures:
        recorder = sonde.Recorder(path, model, measures, when=sonde.every(1))
        recorder.measure()  # So that the first pass of all is sonde's.
        recorder.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), TARGETS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if recorder is not None:
        recorder.close()
    return {**_parts(model), "losses": losses, "random": torch.get_rng_state().numpy().tobytes()}


# What cannot be recorded of such models is named; here it is the training that counts.
@pytest.mark.filterwarnings("ignore::sonde.exceptions.SondeWarning")
@pytest.mark.parametrize(("task", "kind"), list(itertools.product(TASKS, MEASURES)))
def test_a_first_pass_leaves_no_trace(task: str, kind: str, tmp_path: Path) -> None:
    alone = _trained(TASKS[task], tmp_path / "alone", [])
    recorded = _trained(TASKS[task], tmp_path / "run", MEASURES[kind](TASKS[task].inputs()))
    assert recorded == alone


def test_hidden_states_are_as_many_after_a_pass_as_before() -> None:
    torch.manual_seed(0)
    model = _bert().eval()
    sonde.example_gradients(model, F.cross_entropy, _tokens(), TARGETS)
    assert len(model.body(_tokens(), output_hidden_states=True).hidden_states) == 3


@pytest.mark.filterwarnings("ignore::sonde.exceptions.SondeWarning")
def test_gradients_are_those_of_the_model_that_is_trained() -> None:
    torch.manual_seed(0)
    model = _bert().eval()
    model(_tokens())  # The training's own first pass installs its hooks.
    found = sonde.example_gradients(model, F.cross_entropy, _tokens(), TARGETS, store=sonde.Full())
    for row in range(3):
        loss = F.cross_entropy(model(_tokens()[row : row + 1]), TARGETS[row : row + 1])
        (expected,) = torch.autograd.grad(loss, [model.out.weight])
        assert torch.allclose(found.parameters["out.weight"][row], expected, atol=1e-6)


def test_late_layers_are_recorded_once_the_training_has_made_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Writing(makes_layer=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = sonde.Probe(_rows(), TARGETS)
    recorder = sonde.Recorder(tmp_path / "run", model, [sonde.Predictions(probe)])
    with pytest.warns(sonde.SondeWarning, match="makes parameters in its first forward pass"):
        recorder.measure()
    recorder.attach(optimizer)
    for _ in range(2):
        F.cross_entropy(model(_rows()), TARGETS).backward()
        optimizer.step()
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run["predictions"].steps == [0, 1, 2]
    assert [note["reason"] for note in run.notes if note["event"] == "missed"]
