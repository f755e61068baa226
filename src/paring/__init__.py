"""paring makes TensorFlow, Keras and LiteRT models smaller and faster, keeps them right, and proves it."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from paring.training import attach, bench_algorithms, export, finalize, load_model

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
    "attach",
    "bench",
    "bench_algorithms",
    "cluster",
    "compare",
    "delegate_path",
    "export",
    "finalize",
    "load",
    "load_model",
    "optimize",
    "sparsify",
    "tune",
]


def __getattr__(name: str) -> Any:
    """What trains comes with Keras, when it is asked for."""
    if name in ("attach", "bench_algorithms", "export", "finalize", "load_model"):
        from paring import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
