"""Finding the native library, and LiteRT interpreters that use it."""

from __future__ import annotations

import ctypes.util
import warnings
from pathlib import Path

import numpy as np
import pytest

import paring
from paring.demo import load_digits, model_path
from paring.errors import InputError
from paring.runtime import NativeError, litert_interpreter


def outputs(interpreter, x: np.ndarray) -> np.ndarray:
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x)
    interpreter.invoke()
    return interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return load_digits()[1][:1]


def test_a_dense_model_gives_what_it_gives_without_the_delegate(native, image):
    from ai_edge_litert.interpreter import Interpreter

    wanted = outputs(Interpreter(str(model_path())), image)
    np.testing.assert_array_equal(outputs(litert_interpreter(model_path(), 2), image), wanted)
    np.testing.assert_array_equal(outputs(litert_interpreter(model_path().read_bytes()), image), wanted)


def test_the_interpreter_of_tensorflow_loads_it_too(native, image, tensorflow):
    lite = tensorflow.lite
    delegate = lite.experimental.load_delegate(paring.delegate_path(), {"num_threads": 2})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        interpreter = lite.Interpreter(str(model_path()), experimental_delegates=[delegate], num_threads=2)
    np.testing.assert_allclose(outputs(interpreter, image), outputs(litert_interpreter(model_path()), image), atol=1e-6)


def test_threads_and_options_reach_interpreter_and_delegate(native, monkeypatch):
    from ai_edge_litert import interpreter as litert

    seen = {}
    monkeypatch.setattr(litert, "load_delegate", lambda path, options: seen.update(options, path=path) or "delegate")
    monkeypatch.setattr(litert, "Interpreter", lambda **arguments: seen.update(arguments))
    litert_interpreter(
        model_path(), 3, sparsity_threshold=0.75, isa="avx2", verbose=True, experimental_delegates=["other"]
    )
    assert seen == {
        "path": paring.delegate_path(), "model_path": str(model_path()), "experimental_delegates": ["other", "delegate"],
        "num_threads": 3, "verbose": "true", "sparsity_threshold": "0.75", "isa": "avx2",
    }  # fmt: skip


def test_bad_arguments_are_named(native):
    with pytest.raises(InputError, match="at least one thread, got 0"):
        litert_interpreter(model_path(), 0)
    with pytest.raises(InputError, match="avx1024"):
        litert_interpreter(model_path(), isa="avx1024")
    with pytest.raises(InputError, match=r"interpreter for no\.tflite"):
        litert_interpreter("no.tflite")


def test_a_library_that_is_not_there_or_not_ours_is_named(tmp_path: Path, monkeypatch):
    from paring.runtime import native as api

    def load(path: object) -> None:
        monkeypatch.setenv("PARING_LIBRARY", str(path))
        api.library.__wrapped__()

    with pytest.raises(NativeError, match="PARING_LIBRARY: expected a file, got /nowhere"):
        load("/nowhere")
    text = tmp_path / "libparing.so"
    text.write_text("not a library")
    with pytest.raises(NativeError, match="cannot load the native library"):
        load(text)
    monkeypatch.delenv("PARING_LIBRARY")
    monkeypatch.setattr(api, "_INSTALLED", tmp_path / "none.so")
    with pytest.raises(NativeError, match=r"none\.so.*Install one.*pip install"):
        paring.delegate_path()


def test_a_library_of_another_version_is_refused(monkeypatch):
    from paring.runtime import native as api

    other = ctypes.util.find_library("m")
    if other is None:
        pytest.skip("no other library at hand")
    monkeypatch.setattr(api, "delegate_path", lambda: other)
    with pytest.raises(NativeError, match="expected the function paring_pack, got none"):
        api.library.__wrapped__()
