"""Weights of SavedModels that are stored by what they meet: bias correction, ranges and rounding by data."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import saved_models as models

import paring
from paring.compress.quantize import Quantize
from paring.errors import InputError
from paring.formats.saved_model.bundle import Bundle
from paring.formats.saved_model.model import SavedModel
from paring.recipe import Recipe, Rule

BASE = Quantize("int8", "float")


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """TensorFlow deprecates what its own loaders call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def recipe(settings: Quantize) -> Recipe:
    return Recipe((Rule((settings,), kind="*"),), "settings")


def written(source: Path, out: Path, settings: Quantize, data: Any, **more: Any) -> paring.Result:
    return paring.optimize(source, recipe(settings), data, output=out, verified=False, **more)


def outputs(tf: Any, folder: Path, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All outputs of the default signature, sample by sample."""
    loaded = tf.saved_model.load(str(folder))
    call = loaded.signatures["serving_default"]
    rows = [call(**{k: tf.constant(v[n]) for k, v in data.items()}) for n in range(len(next(iter(data.values()))))]
    return {key: np.stack([row[key].numpy() for row in rows]) for key in rows[0]}


@pytest.fixture(scope="module")
def operators(tmp_path_factory: pytest.TempPathFactory, tensorflow: ModuleType) -> Path:
    folder = tmp_path_factory.mktemp("observed") / "operators"
    models.operators(tensorflow, folder)
    return folder


def samples(count: int) -> dict[str, np.ndarray]:
    """With means: what has none loses nothing in the mean."""
    random = np.random.default_rng(0)
    x = random.normal(size=(count, 2, 32)) + random.normal(size=32)
    image = random.normal(size=(count, 2, 8, 8, 4)) + random.normal(size=4)
    return {"x": x.astype(np.float32), "image": image.astype(np.float32)}


# By output of `models.operators`: the dimensions that no channel of its layer is told apart by (samples first).
CHANNELS = {
    "dense": (0, 1), "right": (0, 1), "turned": (0, 1), "both": (0, 1), "batch": (0, 2), "batch_turned": (0, 2),
    "conv": (0, 1, 2, 3), "conv1d": (0, 1, 2), "transposed": (0, 1, 2, 3), "joined": (0, 1), "heads": (0, 1), "left": (0, 2),
    "conv3d": (0, 1, 2, 3, 4),
}  # fmt: skip


def test_bias_correction_gives_back_what_the_mean_of_every_product_loses(operators: Path, tmp_path: Path, tensorflow):
    data = samples(6)
    coarse = replace(BASE, granularity="tensor")
    exact = outputs(tensorflow, operators, data)
    lost = {}
    for name, settings in {"without": coarse, "with": replace(coarse, bias_correction=True)}.items():
        result = written(operators, tmp_path / name, settings, data)
        got = outputs(tensorflow, tmp_path / name, data)
        lost[name] = {key: np.abs((exact[key] - got[key]).mean(axis=over)).max() for key, over in CHANNELS.items()}
    assert result.report.samples == 6
    assert {key for key in CHANNELS if not lost["with"][key] < 2e-5} == set(), lost["with"]
    assert all(value > 2e-4 for value in lost["without"].values()), lost["without"]


def test_what_every_loader_computes_is_the_same(tmp_path: Path, tensorflow):
    """Loops of TensorFlow 1 and reference variables; a constant that is added stands in the loop."""
    models.tf1(tensorflow, tmp_path / "float", resource=False)
    random = np.random.default_rng(0)
    data = {f"{key}/x": (random.normal(size=(8, 40)) + 1).astype(np.float32) for key in
            ("serving_default", "image", "turns", "fed")}  # fmt: skip
    data["feed/given"] = random.normal(size=(48, 32)).astype(np.float32)
    settings = replace(BASE, bias_correction=True, range="mse")
    written(tmp_path / "float", tmp_path / "small", settings, data)
    scopes = SavedModel.open(tmp_path / "small").flow.scopes
    added = [node.name for node in scopes[""].nodes if node.name.endswith("/shift")]
    assert sorted(added) == ["MatMul/shift", "while/MatMul/shift", "y/shift", "z/shift"]
    one, other = (run(tensorflow, tmp_path / "small") for run in (models.run_v1, models.run_v2))
    expected = models.run_v1(tensorflow, tmp_path / "float")
    for key, value in expected.items():
        np.testing.assert_allclose(one[key], other[key], rtol=1e-4, atol=1e-5)
        assert np.linalg.norm(one[key] - value) < 0.05 * np.linalg.norm(value)


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_rounding_by_data_serves_inputs_that_go_together(rounding: str, tmp_path: Path, tensorflow):
    tf, random = tensorflow, np.random.default_rng(0)
    weights = {"first": models.scaled(random, 48, 32), "kernel": models.scaled(random, 3, 3, 4, 16)}

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, value in weights.items():
                setattr(self, name, tf.Variable(value, name=name))

        @tf.function(input_signature=[tf.TensorSpec([1, 48], name="x"), tf.TensorSpec([1, 6, 6, 4], name="image")])
        def run(self, x, image):
            conv = tf.nn.conv2d(image, self.kernel, 2, "SAME")
            return {"y": tf.matmul(x, self.first), "conv": conv}

    net = Net()
    tf.saved_model.save(net, str(tmp_path / "net"), signatures=net.run)
    x = random.normal(size=(64, 1, 6)) @ random.normal(size=(6, 48))  # six directions of 48
    image = np.repeat(random.normal(size=(64, 1, 6, 6, 1)), 4, axis=4) * [1, 2, 3, 4]
    data = {"x": x.astype(np.float32), "image": image.astype(np.float32)}
    exact = outputs(tf, tmp_path / "net", data)
    found = {}
    for settings in (BASE, replace(BASE, rounding=rounding)):
        out = tmp_path / settings.rounding
        result = written(tmp_path / "net", out, settings, data)
        got = outputs(tf, out, data)
        found[settings.rounding] = {k: np.linalg.norm(got[k] - v) / np.linalg.norm(v) for k, v in exact.items()}
    assert all(found[rounding][key] < 0.6 * found["nearest"][key] for key in exact), found
    codes = Bundle(tmp_path / rounding / "variables" / "variables", "out").read("first/.ATTRIBUTES/VARIABLE_VALUE")
    assert codes.dtype == np.int8 and not any("nearest" in row.reason for row in result.report.rows)


def test_layers_that_rounding_by_data_does_not_know_say_so(operators: Path, tmp_path: Path):
    result = written(operators, tmp_path / "out", replace(BASE, rounding="gptq"), samples(2))
    why = {row.name.split(":")[-1]: row.reason for row in result.report.rows if ":" in row.name}
    assert why["a"] == "rule 1"
    assert why["table"].endswith("GatherV2 multiplies nothing, so it is rounded to nearest")
    assert why["split"].endswith("is reshaped on its way, so it is rounded to nearest")


def test_without_data_it_is_refused_or_said(operators: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"rounding gptq needs data. Give samples with --data"):
        written(operators, tmp_path / "out", replace(BASE, rounding="gptq"), None)
    result = written(operators, tmp_path / "out", replace(BASE, bias_correction=True), None)
    assert "no data was given: no bias correction" in result.report.notes


def test_data_that_is_not_finite_inside_the_model_names_the_layer(tmp_path: Path, tensorflow):
    tf = tensorflow

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = tf.Variable(models.scaled(np.random.default_rng(0), 32, 16), name="head")

        @tf.function(input_signature=[tf.TensorSpec([1, 32], name="x")])
        def run(self, x):
            return {"y": tf.matmul(tf.math.log(x), self.head)}

    net = Net()
    tf.saved_model.save(net, str(tmp_path / "net"), signatures=net.run)
    with pytest.raises(InputError, match=r"cannot calibrate for layer MatMul:head: expected finite inputs"):
        written(
            tmp_path / "net", tmp_path / "out", replace(BASE, bias_correction=True), np.zeros((2, 1, 32), np.float32)
        )
    assert not (tmp_path / "out").exists()
