"""Measures: what can be recorded of a training, one file each."""

from sonde.hooks.record import Recording, Subject

from .activations import Activations
from .base import Measure
from .decision_planes import DecisionPlanes
from .example_gradients import ExampleGradients
from .output_gradients import OutputGradients
from .predictions import Predictions
from .scalars import Scalars

__all__ = [
    "Activations",
    "DecisionPlanes",
    "ExampleGradients",
    "Measure",
    "OutputGradients",
    "Predictions",
    "Recording",
    "Scalars",
    "Subject",
]
