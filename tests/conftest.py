"""What tests may need beside the base install, and the one way to go without it.

A test that lacks something is skipped with the reason. `PARING_REQUIRE` (things separated by commas, set by `.ci/run`)
says what this run has: to lack one of those is a failure.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def needs(thing: str, reason: str) -> NoReturn:
    """Ends the test because `thing` is missing: skipped, or failed where PARING_REQUIRE names it.

    Args:
      thing: A short name without commas, as PARING_REQUIRE spells it: `tensorflow`, `shared`, ...
      reason: What is missing and how to get it.
    """
    if _required(thing):
        pytest.fail(f"PARING_REQUIRE names {thing}: {reason}", pytrace=False)
    pytest.skip(f"needs {thing}: {reason}")


def need_module(thing: str, module: str, reason: str) -> ModuleType:
    """The imported module; `needs(thing, reason)` where it is not installed. An install that is broken raises."""
    if importlib.util.find_spec(module) is None:
        needs(thing, reason)
    with warnings.catch_warnings():
        # Other people's deprecations at import are not ours to fail on.
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


@pytest.fixture(autouse=True)
def _modules_of_a_test_end_with_it(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What commands import from a test's folder is not there for the next, which may call its own file alike."""
    before, path, base = set(sys.modules), [*sys.path], tmp_path_factory.getbasetemp()
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if base in Path(getattr(sys.modules[name], "__file__", None) or "/").parents:
            del sys.modules[name]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `data/` and `models/`: $PARING_SHARED, or `shared` beside the repository."""
    folder = Path(os.environ.get("PARING_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "models").is_dir():
        needs("shared", f"no reference models in {folder}/models; set PARING_SHARED to the folder that has them")
    return folder


@pytest.fixture(scope="session")
def tensorflow() -> ModuleType:
    """TensorFlow."""
    return need_module("tensorflow", "tensorflow", "TensorFlow is not installed; `pip install tensorflow-cpu`")


@pytest.fixture(scope="session")
def keras_on_tensorflow(tensorflow: ModuleType) -> ModuleType:
    """Keras, running on TensorFlow."""
    del tensorflow
    keras = need_module("keras", "keras", "Keras is not installed; `pip install keras`")
    if keras.backend.backend() != "tensorflow":
        pytest.skip("needs tensorflow: Keras runs on another backend")
    return keras


@pytest.fixture(scope="session")
def litert_quantizer() -> ModuleType:
    """The official quantizer, to compare with."""
    return need_module(
        "litert-quantizer", "litert_quantizer", "not installed; `pip install litert-quantizer` on Python 3.11 or later"
    )


@pytest.fixture(scope="session")
def native() -> ModuleType:
    """`paring.runtime.native`, where there is a library to go with it."""
    from paring.runtime import native

    if (reason := _no_library(native.delegate_path)) is not None:
        needs("native", reason)
    return native


@pytest.fixture(scope="session")
def operators(tensorflow: ModuleType) -> ModuleType:
    """Paring's TensorFlow operators as functions, where there is a library to go with them."""
    from paring.runtime import native

    if (reason := _no_library(native.operators_path)) is not None:
        needs("native", reason)
    importlib.import_module("paring.tensorflow")
    return tensorflow.load_op_library(native.operators_path())


def pytest_configure(config: pytest.Config) -> None:
    """A hook of this file's is asked about files below it only; one that is registered is asked about all."""
    config.pluginmanager.register(_WithoutOperators())


class _WithoutOperators:
    """`paring.tensorflow` cannot be imported, so not be searched for examples, where there is nothing to register."""

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        from paring.runtime import native

        if (collection_path.parent.name, collection_path.name) != ("paring", "tensorflow.py"):
            return None
        lacks = importlib.util.find_spec("tensorflow") is None or _no_library(native.operators_path) is not None
        return True if lacks else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Examples in docstrings take no fixture: those of the native library fail without it where it is required."""
    examples = ("paring.runtime.native.", "paring.runtime.interpreter.")
    found = [i for i in items if isinstance(i, pytest.DoctestItem) and i.name.startswith(examples)]
    from paring.runtime import native

    reason = _no_library(native.delegate_path) or _no_library(native.operators_path)
    if found and not _required("native") and reason is not None:
        for item in found:
            item.add_marker(pytest.mark.skip(reason=f"needs native: {reason}"))


def _no_library(path: Callable[[], str]) -> str | None:
    """Why there is no native library where `path` looks for it."""
    from paring.runtime.native import NativeError

    try:
        path()
    except NativeError as error:
        return str(error)
    return None


def _required(thing: str) -> bool:
    return thing in {name.strip() for name in os.environ.get("PARING_REQUIRE", "").split(",")}
