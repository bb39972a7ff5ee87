"""Hooks: what runs inside the training process and records it."""

from .attach import attach
from .config import Config
from .config_file import load_config
from .gradients.examplegrads import example_gradients
from .gradients.gradient_result import ExampleGradientResult
from .gradients.module_rules import gradient_rule
from .layer_list import Layer, Layers, layers
from .measures import (
    Activations,
    DecisionPlanes,
    ExampleGradients,
    Measure,
    OutputGradients,
    Predictions,
    Recording,
    Scalars,
    Subject,
)
from .probes import Probe
from .recorder import Recorder
from .schedule import Schedule, at, epochs, every, log_spaced
from .select import layers_of, select_layers
from .stores import Full, Gram, Sketch, Store
from .training import TRAINING, Training

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
