"""Training on TensorFlow, JAX and PyTorch: every case of `training_cases.py`, in one child process per backend."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import needs

SCRIPT = Path(__file__).with_name("training_cases.py")
CASES = re.findall(r"^def (case_\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE)
BACKENDS = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}


def child(backend: str, folder: Path, *cases: str) -> dict[str, str]:
    """What became of the cases, by name."""
    if importlib.util.find_spec(BACKENDS[backend]) is None or importlib.util.find_spec("keras") is None:
        needs(backend, f"not installed; `pip install keras {backend}`")
    environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "error::UserWarning", str(SCRIPT), str(folder), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=800)
    assert "\x1e" in done.stdout, done.stderr[-3000:]
    found: dict[str, str] = json.loads(done.stdout.split("\x1e")[1])
    return found


@pytest.fixture(scope="module", params=BACKENDS)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, child(request.param, folder)


@pytest.mark.parametrize("case", CASES)
def test_training(outcomes: tuple[Path, dict[str, str]], case: str) -> None:
    assert outcomes[1][case] == "ok", outcomes[1][case]


def test_the_exported_file_is_that_of_tensorflow(outcomes: tuple[Path, dict[str, str]], tensorflow: ModuleType) -> None:
    """Whatever backend trained: the same bytes, and what `predict` said there."""
    said = child("tensorflow", outcomes[0], "again")["again"]
    assert said == "ok", said
