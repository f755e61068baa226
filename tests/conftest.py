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
from collections.abc import Iterator
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
    if (reason := _no_library()) is not None:
        needs("native", reason)
    return importlib.import_module("paring.runtime.native")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Examples in docstrings take no fixture: those of the native library fail without it where it is required."""
    examples = ("paring.runtime.native.", "paring.runtime.interpreter.")
    found = [i for i in items if isinstance(i, pytest.DoctestItem) and i.name.startswith(examples)]
    if found and not _required("native") and (reason := _no_library()) is not None:
        for item in found:
            item.add_marker(pytest.mark.skip(reason=f"needs native: {reason}"))


def _no_library() -> str | None:
    """Why there is no native library."""
    from paring.runtime import native

    try:
        native.delegate_path()
    except native.NativeError as error:
        return str(error)
    return None


def _required(thing: str) -> bool:
    return thing in {name.strip() for name in os.environ.get("PARING_REQUIRE", "").split(",")}
