"""With the converter's ranges our int8 file is its twin: the same integers in the file, the same outputs on both."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "converter_twin.py"
NETWORKS = ("ds_cnn", "conv1d", "autoencoder")


@pytest.fixture(scope="module")
def figures(tensorflow: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The benchmark's figures on three small networks, from a process of its own: TensorFlow warns as it pleases."""
    out = tmp_path_factory.mktemp("twin") / "figures.json"
    command = [sys.executable, str(SCRIPT), "--networks", ",".join(NETWORKS), "--write", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert out.is_file(), done.stderr[-2000:]
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize("network", NETWORKS)
def test_the_converters_ranges_give_the_converters_file(figures: dict, network: str) -> None:
    rows = [row for row in figures["tables"]["a: converter's ranges"] if row["network"] == network]
    assert {row["kernels"] for row in rows} == {"xnnpack", "builtin"}
    for row in rows:
        equal, total = row["constants_equal"].split("/")
        assert equal == total
        assert row["same"] == 1.0


@pytest.mark.parametrize("network", NETWORKS)
def test_our_ranges_are_as_good(figures: dict, network: str) -> None:
    rows = [row for row in figures["tables"]["b: our calibration"] if row["network"] == network]
    assert rows
    for row in rows:
        assert row["error_ratio"] <= 1.05
