"""Draw the results of the analyses as matplotlib figures, ready for a paper.

Every function takes a result, or a mapping from names to results to compare runs, and returns a
`Figure` that pyplot has already closed: a notebook shows it once, a script calls `savefig`. Colours
can be told apart with the common colour vision deficiencies, and single heat map values are
readable in grey. Steps are drawn on an axis that is logarithmic but includes step 0.
"""

from .blocks import blocks
from .boundary import Planes, decision_planes, fragmentation, reproducibility
from .cka import cka
from .components import components
from .stiffness import class_matrix, stiffness
from .sweep import sweep

__all__ = [
    "Planes",
    "blocks",
    "cka",
    "class_matrix",
    "components",
    "decision_planes",
    "fragmentation",
    "reproducibility",
    "stiffness",
    "sweep",
]
