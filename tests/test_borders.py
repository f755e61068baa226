"""The borders between the rooms of the house, as one table, and what a bare environment must be able to import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import paring

PACKAGE = Path(next(iter(paring.__path__)))
MODULES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 450


@dataclass(frozen=True)
class Border:
    """Who may import what.

    Attributes:
      imported: Regular expression for the start of a full module name, up to a dot or the end.
      allowed: Regular expression for the start of the path, below the package, of the modules that may.
    """

    imported: str
    allowed: str

    def forbids(self, place: str, name: str) -> bool:
        return bool(re.match(rf"(?:{self.imported})(?:\.|$)", name)) and not re.match(self.allowed, place)


BORDERS = (
    # Libraries: each has one room.
    Border("tensorflow", r"formats/saved_model/|training/marks\.py|tensorflow\.py"),
    Border("keras", r"formats/keras\.py|training/"),
    Border("ai_edge_litert", r"runtime/"),
    Border("yaml", r"recipe\.py"),
    Border("typer", r"cli/"),
    Border("distributed", r"cli/tune\.py"),
    Border("rich", r"cli/|report/"),
    Border("jinja2", r"report/"),
    # Rooms: everyone but the lower ones, who must not know the upper ones.
    Border(r"paring\.(?!errors\b)\w+", r"(?!graph\.py)"),
    Border(r"paring\.formats", r"(?!compress/|plan\.py|runtime/)"),
    Border(r"paring\.(cli|optimize|plan|solve)", r"(?!formats/)"),
)

OUTSIDE_BASE = ("tensorflow", "keras", "tf_keras", "h5py", "PIL", "sklearn", "scipy", "litert_quantizer", "distributed")
"""What the base install does not bring, though the machine that runs the tests may have it."""

IMPORT_EVERY_MODULE = f"""
import importlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OUTSIDE_BASE!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} in the base environment", name=name)

sys.meta_path.insert(0, Absent())
import paring
for module in pkgutil.walk_packages(paring.__path__, "paring."):
    # What is Keras' and TensorFlow's own.
    if not module.name.endswith("__main__") and not module.name.startswith(("paring.training.", "paring.tensorflow")):
        try:
            importlib.import_module(module.name)
        except Exception as error:
            print(f"{{module.name}}: {{type(error).__name__}}: {{error}}")
"""


def imports(source: str, module: str, *, package: bool) -> Iterator[tuple[int, str]]:
    """(line, full name) of every import in `source`, at any depth, relative and `import_module("...")` ones too."""
    parts = module.split(".") if package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from a import b` may bring the module a.b.
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def crossings(source: str, place: str) -> list[str]:
    """What crosses a border in `source`, the module at `place` (a path below the package)."""
    package = place.endswith("__init__.py")
    module = "paring." + place.removesuffix(".py").removesuffix("__init__").strip("/").replace("/", ".")
    return [
        f"{place}:{line} imports {name}"
        for line, name in imports(source, module.rstrip("."), package=package)
        if any(border.forbids(place, name) for border in BORDERS)
    ]


def fresh(code: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_import_crosses_a_border_and_no_module_is_too_long(path: Path):
    source = path.read_text(encoding="utf-8")
    assert not crossings(source, path.relative_to(PACKAGE).as_posix())
    assert len(source.splitlines()) <= MAX_LINES


@pytest.mark.parametrize(
    ("place", "source", "crosses"),
    [
        ("plan.py", "import tensorflow as tf", True),
        ("plan.py", "def f():\n    from tensorflow.python import eager", True),
        ("plan.py", "import tensorflow_metadata", False),
        ("formats/saved_model/read.py", "import tensorflow as tf", False),
        ("formats/keras.py", "import keras", False),
        ("formats/tflite/read.py", "import keras", True),
        ("training/attach.py", "from keras import ops", False),
        ("measure/bench.py", "from ai_edge_litert.interpreter import Interpreter", True),
        ("runtime/runner.py", "importlib.import_module('ai_edge_litert.interpreter')", False),
        ("optimize.py", "importlib.import_module('ai_edge_litert.interpreter')", True),
        ("recipe.py", "import yaml", False),
        ("plan.py", "import yaml", True),
        ("optimize.py", "import rich.progress", True),
        ("report/page.py", "from jinja2 import Environment", False),
        ("measure/compare.py", "from jinja2 import Environment", True),
        ("graph.py", "from paring.errors import InputError", False),
        ("graph.py", "from .errors import InputError", False),
        ("graph.py", "from paring import recipe", True),
        ("compress/base.py", "from ..formats import tflite", True),
        ("compress/__init__.py", "from .formats import tflite", False),
        ("compress/base.py", "from paring.graph import Weight", False),
        ("plan.py", "from paring import formats", True),
        ("formats/__init__.py", "from .. import optimize", True),
        ("formats/tflite/edits.py", "from paring.solve import Edit", True),
        ("formats/tflite/edits.py", "from paring.planet import Mars", False),
        ("runtime/runner.py", "import paring.formats.tflite", True),
        ("optimize.py", "from paring.formats import load", False),
    ],
)
def test_the_table_says_what_it_means(place: str, source: str, crosses: bool):
    assert bool(crossings(source, place)) is crosses


def test_importing_paring_loads_no_framework():
    code = "import paring, sys; print(*[n for n in ('tensorflow', 'keras', 'ai_edge_litert') if n in sys.modules])"
    assert fresh(code) == ""


def test_every_module_imports_in_the_base_environment():
    assert fresh(IMPORT_EVERY_MODULE) == ""
