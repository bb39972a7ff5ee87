"""What to record of a training, and where: everything of a `Recorder` but the model.

Code that makes the model later on, such as a trainer, takes a `Config` in place of a recorder.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn

from sonde.exceptions import InvalidInputError
from sonde.hooks.examples.probe import Probe
from sonde.hooks.losses.default_loss import DefaultLoss
from sonde.hooks.losses.per_example import Loss
from sonde.hooks.losses.scores import Output
from sonde.hooks.measures import (
    Activations,
    DecisionPlanes,
    ExampleGradients,
    Measure,
    Predictions,
    Scalars,
)
from sonde.hooks.model.layers import Selector
from sonde.hooks.recording.recorder import Recorder
from sonde.hooks.schedule import Schedule
from sonde.hooks.training.optimizer_steps import check_optimizer
from sonde.hooks.training.source import TRAINING


@dataclass(frozen=True)
class Config:
    """What to record of a training, and where.

    Without `measures`, good defaults are chosen. On a probe: activations (Gram matrices of every
    layer), predictions and scalars; with a loss, or with classes as targets, per-example gradients
    too; decision planes where they are asked for, as they cost planes × resolution² evaluations of
    the model. Without a probe, in band: the activations of the training itself, and scalars.

    Args:
        path: The run directory.
        measures: What to record; None chooses.
        probe: The examples to measure on: a `Probe`, or what one takes.
        loss: (outputs, targets) to a scalar; by default cross-entropy, if targets are integers.
        output: Which output of the model is recorded as predictions, decides on planes and goes
            into the default loss, as for `Predictions`; None where it is clear.
        layers: The layers whose activations are recorded; None takes every module without children.
        when: When to measure; by default log-spaced, for ever.
        planes: How many decision planes through the probe's examples; they need floating-point
            inputs of at least three classes.
        resolution: Points per axis of a decision plane.
        id_key: Which entry of a batch holds the ids of its examples: its name, or its position in
            batches that are tuples; for the integrations of trainers, which see the batches.
        reduction: How the training's loss is made of the losses of the examples; without it,
            gradients in band keep the scale of the loss. For the integrations, too.
        options: Other arguments of `Recorder`, by name.

    Raises:
        InvalidInputError: If an option has no such name, or two arguments exclude each other.
    """

    path: str | os.PathLike[str]
    measures: Sequence[Measure] | None = None
    probe: Probe | Any | None = None  # Any: what a Probe takes.
    loss: Loss | None = None
    output: Output | None = None
    layers: Selector | Sequence[Selector] | None = None
    when: Schedule | None = None
    planes: int = 0
    resolution: int = 32
    id_key: str | int | None = None
    reduction: Literal["mean", "sum"] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # Any: as the recorder has them.

    def __post_init__(self) -> None:
        check_names(self.options, recorder_options(), "option")
        if not isinstance(self.path, str | os.PathLike):
            raise InvalidInputError(f"`path` (={self.path!r}) must be the path of a run directory")
        if self.reduction not in (None, "mean", "sum"):
            raise InvalidInputError(
                f"`reduction` (={self.reduction!r}) must be 'mean', 'sum' or None"
            )
        names = ("probe", "loss", "output", "layers", "planes")
        chosen = [name for name in names if self._is_given(name)]
        named = ", ".join(f"`{name}`" for name in chosen)
        if self.measures is not None and chosen:
            raise InvalidInputError(
                f"`measures` say all that is recorded; leave out {named}, or "
                "give it to the measures themselves"
            )
        without_use = [name for name in ("loss", "output", "planes") if self._is_given(name)]
        if self.measures is None and self.probe is None and without_use:
            raise InvalidInputError(
                f"`{without_use[0]}` needs a probe; give probe=sonde.Probe(inputs, targets)"
            )

    def recorder(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
    ) -> Recorder:
        """Make the recorder of a model.

        Args:
            model: The model.
            optimizer: Its optimizer; steps are counted by it. Without one, call `recorder.step()`.

        Returns:
            The recorder, attached to the optimizer. It closes itself at interpreter exit.

        Raises:
            InvalidInputError: If planes are asked for and the probe does not allow them.
            SondeError: If another argument does not fit; see `Recorder`.
        """
        if optimizer is not None:
            check_optimizer(optimizer)  # Before a run directory is made.
        measures = self.chosen() if self.measures is None else self.measures
        recorder = Recorder(self.path, model, measures, when=self.when, **self.options)
        return recorder if optimizer is None else recorder.attach(optimizer)

    def without_outputs(self) -> Config:
        """Return what it chooses but for measures that need to know which output is meant."""
        chosen = self.chosen() if self.measures is None else self.measures
        kept = [m for m in chosen if isinstance(m, Activations | Scalars)]
        return Config(
            self.path,
            kept,
            when=self.when,
            id_key=self.id_key,
            reduction=self.reduction,
            options=self.options,
        )

    def _is_given(self, name: str) -> bool:
        given = getattr(self, name)
        return given is not None and (name != "planes" or bool(given))

    def chosen(self) -> list[Measure]:
        """Return the measures that the probe allows."""
        if self.probe is None:
            return [Activations(TRAINING, self.layers), Scalars()]
        examples = self.probe if isinstance(self.probe, Probe) else Probe(self.probe)
        targets = examples.targets
        has_classes = targets is not None and targets.ndim == 1 and not targets.is_floating_point()
        measures: list[Measure] = [
            Activations(examples, self.layers),
            Predictions(examples, output=self.output),
            Scalars(),
        ]
        loss = self.loss
        if loss is None and targets is not None and has_classes:
            loss = DefaultLoss(targets, self.output)
        if loss is not None and targets is not None:
            measures.append(ExampleGradients(examples, loss))
        if self.planes:
            measures.append(self._decision_planes(examples))
        return measures

    def _decision_planes(self, examples: Probe) -> DecisionPlanes:
        inputs, targets = examples.inputs, examples.targets
        is_first = examples.axes.batch_dim == 0
        if targets is None or not isinstance(inputs, torch.Tensor) or not is_first:
            raise InvalidInputError(
                "`planes` needs a probe of one input tensor with classes as targets; "
                "give Probe(inputs, targets), or leave `planes` out"
            )
        return DecisionPlanes(
            inputs,
            targets,
            triplets=self.planes,
            resolution=self.resolution,
            ids=examples.ids,
            output=self.output,
        )


def as_config(
    given: Config | str | os.PathLike[str],
    options: Mapping[str, Any],  # Any: each has a type of its own.
) -> Config:
    """Return what (config_or_path, **options) says, as every integration takes it.

    Args:
        given: A `Config`, which says all; or the run directory.
        options: Keyword arguments of `Config` and `Recorder`; none beside a `Config`.

    Returns:
        The configuration.

    Raises:
        InvalidInputError: If an option has no such name, or stands beside a `Config`.
    """
    if isinstance(given, Config):
        if options:
            raise InvalidInputError(
                f"{', '.join(f'`{name}`' for name in options)} beside a Config; a Config says all, "
                "so use dataclasses.replace(config, …) to change it"
            )
        return given
    own = {item.name for item in fields(Config)} - {"path"}
    check_names(options, [*own, *recorder_options()], "option")
    for_recorder = dict(options.get("options") or {})
    for_recorder |= {name: value for name, value in options.items() if name not in own}
    chosen = {name: value for name, value in options.items() if name in own and name != "options"}
    return Config(given, **chosen, options=for_recorder)


def recorder_options() -> list[str]:
    """Return the arguments of `Recorder` that a `Config` has no field of its own for."""
    parameters = inspect.signature(Recorder).parameters.values()
    only_by_name = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY]
    return [name for name in only_by_name if name != "when"]


def check_names(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """Refuse unknown names, and tell which known ones are near.

    Raises:
        InvalidInputError: If a name is not known.
    """
    names = sorted(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
            hint = f"near: {', '.join(near)}" if near else f"there are: {', '.join(names)}"
            raise InvalidInputError(f"there is no {what} `{name}`; {hint}")
