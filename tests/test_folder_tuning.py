"""`tune` on SavedModels: the smallest folder within a bound, every candidate measured in TensorFlow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import saved_models as models

from paring.errors import InputError, UnsupportedError
from paring.formats.saved_model.model import SavedModel, folder_bytes
from paring.tuning import tune


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """TensorFlow deprecates what its own loaders call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def net(tf: Any, folder: Path) -> None:
    """A weight that two operators share, one with a channel that int8 would ruin where it had one scale; two signatures."""
    random = np.random.default_rng(0)

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = tf.Variable(models.scaled(random, 32, 32), name="shared")
            self.head = tf.Variable(models.scaled(random, 32, 16), name="head")

        @tf.function(input_signature=[tf.TensorSpec([1, 32], name="x")])
        def run(self, x):
            x = tf.tanh(tf.matmul(tf.tanh(tf.matmul(x, self.shared)), self.shared, transpose_b=True))
            return {"y": tf.matmul(x, self.head)}

        @tf.function(input_signature=[tf.TensorSpec([1, 16], name="z")])
        def other(self, z):
            return {"y": z + 1.0}

    module = Net()
    tf.saved_model.save(module, str(folder / "net"), signatures={"serving_default": module.run, "serve": module.run})
    tf.saved_model.save(module, str(folder / "two"), signatures={"serving_default": module.run, "other": module.other})


def test_the_smallest_folder_within_the_bound(tmp_path: Path, tensorflow: ModuleType):
    net(tensorflow, tmp_path)
    data = np.random.default_rng(1).normal(size=(16, 32)).astype(np.float32)
    with ThreadPoolExecutor(1) as executor:
        found = tune(tmp_path / "net", data, output=tmp_path / "out", max_drop=1.0, executor=executor)
        with pytest.raises(InputError, match="bad activations: expected dynamic or bfloat16, got int8"):
            tune(tmp_path / "net", data, output=tmp_path / "other", max_drop=1.0, activations="int8")
    assert {s.layer.split(":")[-1]: s.scheme for s in found.tuning.sensitivity if s.scheme == "int8"} == {
        "shared": "int8", "head": "int8",
    }  # fmt: skip
    assert all(s.bytes < 0 for s in found.tuning.sensitivity)  # both readers of a weight are told the same
    chosen = next(c for c in found.tuning.candidates if c.chosen)
    assert chosen.label == "all int8" and chosen.bytes == min(c.bytes for c in found.tuning.candidates)
    flow = SavedModel.open(tmp_path / "out").flow
    assert {source.label: source.dtype for source in flow.sources.values() if source.label} == {"shared": 6, "head": 6}
    assert folder_bytes(tmp_path / "out") < found.tuning.before.bytes
    assert not (tmp_path / "out.tune").exists()


def test_signatures_with_inputs_of_their_own_are_refused(tmp_path: Path, tensorflow: ModuleType):
    net(tensorflow, tmp_path)
    with pytest.raises(UnsupportedError, match="cannot tune a model with several signatures"):
        tune(tmp_path / "two", np.zeros((4, 32), np.float32), output=tmp_path / "out", max_drop=1.0)
    assert not (tmp_path / "out.tune").exists()
