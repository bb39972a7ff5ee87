"""Hooks: what runs inside the training process and records it."""

from .config.attach import attach
from .config.config import Config
from .config.file import load_config
from .examples.probe import Probe
from .gradients.compute import example_gradients
from .gradients.result import ExampleGradientResult
from .gradients.rules.user import gradient_rule
from .measures import (
    Activations,
    DecisionPlanes,
    ExampleGradients,
    Measure,
    OutputGradients,
    Predictions,
    Scalars,
)
from .model.layers import layers_of, select_layers
from .record import Recording, Subject
from .recording.layer_list import Layer, Layers, layers
from .recording.recorder import Recorder
from .schedule import Schedule, at, epochs, every, log_spaced
from .stores.stores import Full, Gram, Sketch, Store
from .training.source import TRAINING, Training

__all__ = [
    "TRAINING",
    "Activations",
    "Config",
    "DecisionPlanes",
    "ExampleGradientResult",
    "ExampleGradients",
    "Full",
    "Gram",
    "Layer",
    "Layers",
    "Measure",
    "OutputGradients",
    "Predictions",
    "Probe",
    "Recorder",
    "Recording",
    "Scalars",
    "Schedule",
    "Sketch",
    "Store",
    "Subject",
    "Training",
    "at",
    "attach",
    "epochs",
    "every",
    "example_gradients",
    "gradient_rule",
    "layers",
    "layers_of",
    "load_config",
    "log_spaced",
    "select_layers",
]
