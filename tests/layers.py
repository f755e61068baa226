"""A small network with layers of each kind that compression knows, and what tests look at of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from models import Net

from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.view import view
from paring.runtime import Worker

LAYERS = ("first", "depthwise", "point", "head")
PRUNED = ("first", "point", "head")


def network(seed: int = 0) -> tuple[TfliteModel, np.ndarray]:
    """A 3x3, a depthwise, a 1x1 convolution of 20 outputs (no whole number of 16) and a dense layer; correlated inputs."""
    rng, net = np.random.default_rng(seed), Net()
    x = net.input((1, 6, 6, 8), name="x")

    def normal(*shape: int) -> int:
        return net.constant((rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32))

    conv = ("Conv2DOptions", {"stride_h": 1, "stride_w": 1, "fused_activation_function": 1})
    depth = ("DepthwiseConv2DOptions", {"stride_h": 2, "stride_w": 2, "depth_multiplier": 1})
    y = net.then("CONV_2D", [x, normal(32, 3, 3, 8), normal(32)], (1, 6, 6, 32), conv, "first")
    y = net.then("DEPTHWISE_CONV_2D", [y, normal(1, 3, 3, 32), normal(32)], (1, 3, 3, 32), depth, "depthwise")
    y = net.then("CONV_2D", [y, normal(20, 1, 1, 32), normal(20)], (1, 3, 3, 20), conv, "point")
    y = net.then("RESHAPE", [y, net.constant(np.array([1, 180], np.int32))], (1, 180), ("ReshapeOptions", {}), "flat")
    dense = ("FullyConnectedOptions", {})
    net.outputs.append(net.then("FULLY_CONNECTED", [y, normal(24, 180), normal(24)], (1, 24), dense, "head"))
    data = rng.normal(size=(48, 6, 6, 3)) @ rng.normal(size=(3, 8)) + 0.3 * rng.normal(size=(48, 6, 6, 8))
    return net.finish(), data.astype(np.float32)


def rules(*applied: dict, **selectors: object) -> dict:
    return {"rules": [{"kind": "*", **selectors, "apply": list(applied) if len(applied) > 1 else applied[0]}]}


def weights(model: TfliteModel) -> dict[str, np.ndarray]:
    """The weights of each layer, as its operator sees them."""
    graph = view(model, densify=True)
    found = {op.name: tensor for op in graph.ops if not op.constant for _, tensor in graph.weights_of(op)}
    return {name.removesuffix("_int8"): np.asarray(t.weight.read()) for name, t in found.items()}


def outputs(model: TfliteModel, data: np.ndarray, path: Path) -> np.ndarray:
    model.save(path)
    with Worker() as worker:
        worker.load("model", path)
        return np.concatenate([worker.run("model", [x[None]])[0] for x in data])
