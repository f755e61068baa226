"""Layers of every kind train under int8, and what is exported computes what the deployed form does."""

from __future__ import annotations

import collections
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter

import paring
from paring import training
from paring.formats.tflite.view import view

# Keras' own call of np.array on its variables.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "families.py"
RECIPE = {"version": 1, "rules": [{"kind": "*", "apply": {"quantize": {"weights": "int8", "activations": "int8"}}}]}
KINDS = ("SeparableConv2D", "Conv2DTranspose", "GroupedConv", "nested", "subclassed")
"""Each has something of its own in the file. benchmarks/coverage.py runs all kinds, and each longer."""


@pytest.fixture(scope="module")
def families(tensorflow) -> ModuleType:
    """The models that docs/coverage.md is about."""
    del tensorflow
    found = importlib.util.spec_from_file_location("families", SCRIPT)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["families"] = module  # dataclasses look themselves up there
    found.loader.exec_module(module)
    return module


def run(path: Path, x: np.ndarray) -> np.ndarray:
    interpreter = Interpreter(model_path=str(path), num_threads=1)
    interpreter.allocate_tensors()
    start, end = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    found = []
    for sample in x:
        interpreter.set_tensor(start, sample[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(end)[0].copy())
    return np.stack(found)


def quantum(graph: Any) -> float:
    """The step of the model's output."""
    last = graph.producers()[graph.outputs[0]]
    assert last.native == "DEQUANTIZE", f"the output is made by {last.native}"
    return float(graph.tensors[last.inputs[0]].quantization.scale[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_trains_and_its_file_computes_its_deployed_form(kind, families, tmp_path):
    import keras

    case = families.build(kind)
    model = case.model
    before = [v.numpy().copy() for v in model.trainable_variables]
    attachment = training.attach(model, RECIPE, case.x)
    model.compile(keras.optimizers.SGD(0.01), case.loss)
    history = model.fit(case.x, case.y, batch_size=4, epochs=1, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    still = [
        v.path for v, b in zip(model.trainable_variables, before, strict=True) if b.ndim > 1 and (v.numpy() == b).all()
    ]
    assert not still, "weights that were not trained"  # a bias in front of a normalization has no gradient
    weighty = [row for row in attachment.rows if row.weights and row.became == "float"]
    assert not weighty, f"left float: {weighty}"

    deployed = model.predict(case.x, verbose=0)
    result = training.export(model, tmp_path / "model.tflite", case.x, verified=False)
    graph = view(paring.load(tmp_path / "model.tflite"))
    off = np.abs(run(tmp_path / "model.tflite", case.x) - deployed) / quantum(graph)
    assert np.mean(off < 1.01) > 0.9 and off.max() < 3.01, f"{off.max():.2f} quanta"

    named = collections.Counter(row.native for row in result.report.rows if row.mode == "float")
    floats = collections.Counter(
        op.native
        for op in graph.ops
        if op.native not in ("QUANTIZE", "DEQUANTIZE")
        and any(graph.tensors[t].dtype == "float32" for t in (*op.inputs, *op.outputs) if t is not None)
    )
    assert not floats - named, "float operators that the report does not name"


def test_a_layer_of_ones_own_is_saved_and_goes_on(families, tmp_path):
    import keras

    case = families.build("custom")
    case.model.compile(keras.optimizers.SGD(0.01), case.loss)
    training.attach(case.model, RECIPE, case.x)
    case.model.fit(case.x, case.y, batch_size=4, epochs=1, verbose=0)
    case.model.save(tmp_path / "middle.keras")
    loaded = training.load_model(tmp_path / "middle.keras")
    np.testing.assert_array_equal(loaded.predict(case.x, verbose=0), case.model.predict(case.x, verbose=0))
    losses = [float(m.train_on_batch(case.x, case.y)) for m in (case.model, loaded)]
    assert losses[0] == losses[1]
