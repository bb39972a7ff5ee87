import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import sonde
from sonde.exceptions import InvalidInputError
from sonde.hooks.config.config import as_config


def test_without_a_probe_the_training_itself_is_recorded(
    tmp_path: Path, conv_net: nn.Module, images: Tensor
) -> None:
    optimizer = torch.optim.SGD(conv_net.parameters(), lr=0.1)
    recorder = sonde.Config(tmp_path / "run", layers=nn.Linear).recorder(conv_net, optimizer)
    conv_net(images).sum().backward()
    optimizer.step()
    recorder.close()
    run = sonde.open_run(tmp_path / "run")
    assert run.steps("activations") == [0]
    assert run.layers == list(sonde.hooks.select_layers(conv_net, nn.Linear))
    assert sorted(run.measures) == ["activations", "scalars"]


def test_a_config_gives_its_options_to_the_recorder(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    config = sonde.Config(tmp_path / "run", options={"config": {"lr": 0.5}})
    config.recorder(model).close()
    assert sonde.open_run(tmp_path / "run").info["config"] == {"lr": 0.5}


def test_keywords_that_a_config_lacks_are_the_recorders() -> None:
    when = sonde.every(3)
    made = as_config("run", {"when": when, "on_error": "raise", "options": {"resume": True}})
    assert made == sonde.Config("run", when=when, options={"resume": True, "on_error": "raise"})


def test_a_config_is_taken_as_it_is() -> None:
    config = sonde.Config("run", when=sonde.every(3))
    assert as_config(config, {}) is config
    with pytest.raises(InvalidInputError, match=r"`when` beside a Config; .*replace\(config"):
        as_config(config, {"when": None})
    assert dataclasses.replace(config, path="other").path == "other"


@pytest.mark.parametrize("name", ["on_errors", "probes", "wen"])
def test_an_unknown_option_is_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    near = {"on_errors": "on_error", "probes": "probe", "wen": "when"}[name]
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match=f"there is no option `{name}`; near: {near}"):
        sonde.attach(model, optimizer, tmp_path / "run", **{name: 1})
    assert not (tmp_path / "run").exists()


def test_an_option_near_to_none_names_all() -> None:
    with pytest.raises(InvalidInputError, match="there are: block, config, max_step_bytes, on_err"):
        sonde.Config("run", options={"zzz": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"measures": [], "layers": "a"}, "`measures` say all that is recorded; leave out `layers"),
        ({"planes": 3}, "`planes` needs a probe; give probe="),
        ({"loss": mse_loss}, "`loss` needs a probe; give probe="),
        ({"reduction": "max"}, "`reduction` .='max'. must be 'mean', 'sum' or None"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        as_config("run", arguments)
    with pytest.raises(InvalidInputError, match=r"`path` \(=3\) must be the path"):
        sonde.Config(3)  # type: ignore[arg-type]  # Any other type is what is tried.


def test_what_only_trainers_can_use_is_refused_in_a_loop(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match=r"call recorder.batch\(ids=…"):
        sonde.attach(model, optimizer, tmp_path / "run", id_key="index")
