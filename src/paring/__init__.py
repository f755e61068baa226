"""paring makes TensorFlow, Keras and LiteRT models smaller and faster, keeps them right, and proves it."""

from paring.cluster import cluster
from paring.errors import BoundError, InputError, ParingError, UnsupportedError
from paring.formats import load
from paring.measure.bench import bench
from paring.measure.compare import compare
from paring.optimize import Result, optimize
from paring.recipe import Recipe, Rule
from paring.runtime.native import delegate_path
from paring.sparsify import sparsify
from paring.tuning import Tuned, tune

__version__ = "0.1.0"
__all__ = [
    "BoundError",
    "InputError",
    "ParingError",
    "Recipe",
    "Result",
    "Rule",
    "Tuned",
    "UnsupportedError",
    "__version__",
    "bench",
    "cluster",
    "compare",
    "delegate_path",
    "load",
    "optimize",
    "sparsify",
    "tune",
]
