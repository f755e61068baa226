"""The programs in examples/ run as a reader would start them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import saved_models as models
from conftest import REPOSITORY, need_module

import paring

WAIT = 120  # seconds, for TensorFlow to start on a busy machine


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tensorflow: Any) -> Iterator[tuple[Path, str]]:
    """A quantized model with two signatures, and the address of a server that has it."""
    for module in ("fastapi", "uvicorn"):
        need_module(module, module, f"not installed; `pip install {module}`")
    folder = tmp_path_factory.mktemp("served")
    models.functions(tensorflow, folder / "model")
    paring.optimize(folder / "model", "bf16-int8", output=folder / "small", verified=False)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, str(REPOSITORY / "examples" / "serve.py"), str(folder / "small"), "--port", str(port)]
    with open(folder / "log", "w", encoding="utf-8") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until = time.monotonic() + WAIT
        while server.poll() is None and time.monotonic() < until:
            with socket.socket() as found:
                if found.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.2)
        else:
            pytest.fail(f"the server did not start: {(folder / 'log').read_text(encoding='utf-8')}")
        yield folder / "small", f"http://127.0.0.1:{port}/v1/models/model:predict"
    finally:
        server.terminate()
        server.wait(30)


def ask(address: str, body: bytes) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_served_model_answers_as_it_does_in_python(served: tuple[Path, str], tensorflow: Any):
    folder, address = served
    signatures = tensorflow.saved_model.load(str(folder)).signatures
    x = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    (name,) = signatures["serving_default"].structured_input_signature[1]
    expected = signatures["serving_default"](**{name: tensorflow.constant(x)})["y"].numpy()

    code, found = ask(address, json.dumps({"inputs": x.tolist()}).encode())
    assert code == 200 and np.allclose(found["outputs"]["y"], expected, rtol=1e-5, atol=1e-6)

    rows = {"signature_name": "words", "instances": [{"text": "a"}, {"text": "c"}]}
    code, found = ask(address, json.dumps(rows).encode())
    assert code == 200 and [row["text"] for row in found["predictions"]] == ["a!", "c!"]
    vectors = signatures["words"](text=tensorflow.constant(["a", "c"]))["v"].numpy()
    assert np.allclose([row["v"] for row in found["predictions"]], vectors, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"{", "JSON decode error"),
        (b'{"instances": [[1.0, 2.0]], "signature_name": "none"}', "serving_default"),
        (b'{"rows": [[1.0, 2.0]]}', "expected instances or inputs"),
        (b'{"inputs": {"z": [1.0]}}', "expected the inputs"),
        (b'{"instances": [["a"]]}', "float"),
        (b'{"instances": [[1.0, 2.0]]}', "32"),
    ],
)
def test_a_bad_request_gets_400_and_the_reason(body: bytes, says: str, served: tuple[Path, str]):
    code, found = ask(served[1], body)
    assert (code, says in found["error"]) == (400, True), found
