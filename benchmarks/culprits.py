"""Does `paring.compare` find the layer that was made bad on purpose? Five networks, four kinds of damage, static int8.

A random layer in the middle of each network is damaged; everything else is quantized as always. A damage that moves the
layer's result by less than a tenth of its size (rounding weights that a large bias outweighs) makes nothing bad: another
layer is drawn. What counts is the rank of the damaged layer. Beside it, from the same run, its rank where layers are ordered
by what others measure: the mean square error over scale squared of a layer fed with the float input (TensorFlow's
QuantizationDebugger), and signal to noise inside the whole model (the official quantizer's `validate`).
Models are compared on samples that they were calibrated on: with random weights, other
samples fall outside of the ranges of layers that nobody damaged.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import contextlib
import io
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

import figures
import numpy as np
import zoo

from paring import compare, load, optimize
from paring.calibration import Statistics
from paring.formats.tflite.draft import Draft
from paring.formats.tflite.extract import extract
from paring.formats.tflite.model import TfliteModel
from paring.graph import Graph, Op, TensorId
from paring.runtime import Worker

NETWORKS = ("resnet8", "mobilenet_v2", "mobilenet_v3_small", "ds_cnn", "unet")
CALIBRATION, SAMPLES = 64, 16
LOUD = 64.0  # how much louder the outlier channel gets
WIDE, NARROW = 16.0, 1 / 8  # factors of a wrong range
LINEAR = ("conv2d", "depthwise_conv2d", "dense", "conv2d_transpose")
BAD = 0.1  # what a damage moves of the layer's result, relative to its size, at least
NONE, RELU = 0, 1


class Network:
    """A float model, what calibration saw of it, and its layers that may be damaged."""

    def __init__(self, content: bytes, samples: np.ndarray) -> None:
        self.model, self.samples = load(content), samples
        self.graph: Graph = self.model.graph
        made = optimize(content, "int8", samples[:CALIBRATION], verified=False)
        assert made.statistics is not None
        self.statistics = made.statistics
        self.readers = self.graph.consumers()
        linear = [op for op in self.graph.ops if op.kind in LINEAR]
        self.middle = linear[1:-1]

    def behind(self, op: Op) -> list[Op]:
        """The operators that read a layer's result, through those that keep its grid."""
        found: list[Op] = []
        todo = [op]
        while todo:
            for reader, _ in self.readers.get(todo.pop().outputs[0], ()):
                found.append(reader)
                if reader.demands is not None and reader.demands.same:
                    todo.append(reader)
        return found

    def values(self, tensor: TensorId) -> np.ndarray:
        """A constant's values."""
        weight = self.graph.tensors[tensor].weight
        assert weight is not None
        return np.array(weight.read())

    def results(self, op: Op, model: TfliteModel | None = None) -> np.ndarray:
        """A layer's float results on some samples [samples, ..., channels], in another model of the same tensors too."""
        with tempfile.TemporaryDirectory(prefix="culprits-") as folder, Worker() as worker:
            path = Path(folder) / "part.tflite"
            extract(model or self.model, None, [op.outputs[0]]).save(path)
            worker.load("part", path)
            return np.stack([worker.run("part", [s[None]])[0][0] for s in self.samples[:SAMPLES]])

    def moved(self, op: Op, model: TfliteModel) -> bool:
        """True where a changed model's result of this layer is bad."""
        exact = self.results(op)
        return bool(np.linalg.norm(self.results(op, model) - exact) >= BAD * np.linalg.norm(exact))

    def changed(self, constants: dict[TensorId, np.ndarray]) -> TfliteModel:
        """The model with other constants."""
        draft = Draft(self.model)
        for (number, index), values in constants.items():
            table = draft.subgraphs[number].tensors[index]
            table.buffer = draft.buffer(np.ascontiguousarray(values, np.float32))
        return TfliteModel.parse(memoryview(draft.finish().to_bytes()))

    def quantized(self, model: TfliteModel, statistics: Statistics) -> TfliteModel:
        """The int8 model with given ranges."""
        return optimize(model, "int8", statistics=statistics, verified=False).model


def outlier_channel(network: Network, rng: np.random.Generator) -> tuple[Op, TfliteModel, TfliteModel] | None:
    """One channel 64 times as loud, the weights that read it 64 times smaller: the same function, a hard one for int8."""
    able = []
    for op in network.middle:
        uses = network.readers.get(op.outputs[0], [])
        right = [use.kind in ("conv2d", "depthwise_conv2d", "dense") and port == 0 for use, port in uses]
        flat = all(use.kind != "dense" or network.graph.tensors[op.outputs[0]].shape[-1]
                   == network.graph.tensors[use.inputs[1]].shape[-1] for use, _ in uses)  # fmt: skip
        if uses and all(right) and flat and op.params.get("fused_activation_function", 0) in (NONE, RELU):
            able.append(op)
    if not able:
        return None
    op = able[rng.integers(len(able))]
    peak = np.abs(network.results(op)).reshape(-1, network.graph.tensors[op.outputs[0]].shape[-1]).max(0)
    channel = rng.choice(np.flatnonzero(peak >= peak.max() / 2))  # so that it does stand out
    constants = {}
    weights, bias = network.values(op.inputs[1]), network.values(op.inputs[2])
    axis = 3 if op.kind == "depthwise_conv2d" else 0
    np.moveaxis(weights, axis, 0)[channel] *= LOUD
    bias[channel] *= LOUD
    constants[op.inputs[1]], constants[op.inputs[2]] = weights, bias
    for reader, _ in network.readers[op.outputs[0]]:
        read = network.values(reader.inputs[1])
        read[..., channel] /= LOUD
        constants[reader.inputs[1]] = read
    loud = network.changed(constants)
    return op, loud, optimize(loud, "int8", network.samples[:CALIBRATION], verified=False).model


def wrong_range(network: Network, rng: np.random.Generator) -> tuple[Op, TfliteModel, TfliteModel] | None:
    """The range of one result 16 times too wide, or 8 times too narrow."""
    able = [op for op in network.middle if all(r.kind != "concatenate" for r in network.behind(op))]
    op = able[rng.integers(len(able))]
    factor = (WIDE, NARROW)[rng.integers(2)]
    tensors = dict(network.statistics.tensors)
    for one in [op, *(r for r in network.behind(op) if r.demands is not None and r.demands.same)]:
        seen = tensors.get(one.outputs[0])
        if seen is not None:
            tensors[one.outputs[0]] = replace(seen, low=seen.low * factor, high=seen.high * factor)
    return op, network.model, network.quantized(network.model, replace(network.statistics, tensors=tensors))


def two_bits(network: Network, rng: np.random.Generator) -> tuple[Op, TfliteModel, TfliteModel] | None:
    """The weights of one layer rounded to the 2-bit codes -1, 0 and 1 of each channel; they are stored as int8."""
    for op in rng.permutation(np.array(network.middle, object)):
        weights = network.values(op.inputs[1])
        axes = (0, 1, 2) if op.kind == "depthwise_conv2d" else tuple(range(1, weights.ndim))
        scale = np.maximum(np.abs(weights).max(axis=axes, keepdims=True), 1e-30)
        coarse = network.changed({op.inputs[1]: np.rint(weights / scale) * scale})
        if network.moved(op, coarse):
            return op, network.model, network.quantized(coarse, network.statistics)
    return None


def wrong_bias(network: Network, rng: np.random.Generator) -> tuple[Op, TfliteModel, TfliteModel] | None:
    """The bias of one layer shifted in every channel by half a standard deviation of its result, up or down."""
    for op in rng.permutation(np.array(network.middle, object)):
        if op.kind == "conv2d_transpose" or len(op.inputs) < 3:
            continue
        bias = network.values(op.inputs[2])
        shift = 0.5 * network.results(op).std() * rng.choice([-1, 1], bias.shape)
        shifted = network.changed({op.inputs[2]: bias + shift})
        if network.moved(op, shifted):
            return op, network.model, network.quantized(shifted, network.statistics)
    return None


DAMAGES = {
    "outlier channel": outlier_channel,
    "wrong range": wrong_range,
    "2-bit weights": two_bits,
    "wrong bias": wrong_bias,
}


def float_file(name: str, folder: Path) -> bytes:
    """TensorFlow's float conversion of a network of the zoo."""
    path = folder / f"{name}.float.tflite"
    if not path.is_file():
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path.write_bytes(zoo.convert_float(zoo.build(name)))
    return path.read_bytes()


def measure(name: str, network: Network, seed: int, figure: figures.Figures) -> list[tuple[int, int, int]]:
    """The ranks of the damaged layers of one network: by blame, and by what others measure."""
    ranks = []
    for number, (damage, make) in enumerate(DAMAGES.items()):
        made = make(network, np.random.default_rng([seed, zoo.NAMES.index(name), number]))
        if made is None:
            figure.note(f"{name}: no layer can be given an {damage}")
            continue
        op, source, optimized = made
        samples = network.samples[:SAMPLES]
        found = compare(source, optimized, samples, histograms=False)
        names = [found.layers[n].name for n in found.ranking]
        rank = names.index(op.name) + 1
        blames = [found.layers[n].blame for n in found.ranking]
        alone = [layer for layer in found.layers if layer.own is not None and layer.own.mse is not None]
        alone.sort(key=lambda layer: -layer.own.mse)
        inside = [layer for layer in found.layers if layer.accumulated is not None]
        inside.sort(key=lambda layer: layer.accumulated.snr_db)
        others = [[layer.name for layer in order].index(op.name) + 1 for order in (alone, inside)]
        culprits = [found.layers[n].name for n in found.culprits]
        figure.row(
            f"seed {seed}", network=name, damage=damage, kind=op.native, layers=len(found.layers), rank=rank,
            blame_db=blames[rank - 1], next_db=blames[1 if rank == 1 else 0], named=op.name in culprits,
            culprits=len(culprits), rank_own_mse=others[0], rank_snr_inside=others[1],
        )  # fmt: skip
        ranks.append((rank, *others))
    return ranks


def main() -> int:
    args = figures.arguments(__doc__, networks=",".join(NETWORKS), seeds="1,2", keep="")
    figure = figures.Figures(
        "culprits",
        "static int8, one layer damaged on purpose; rank of that layer among all (1 is what it should be), what it adds in dB "
        "and what the worst other layer adds; rank_own_mse and rank_snr_inside order by what other debuggers measure.",
    )
    with tempfile.TemporaryDirectory(prefix="culprits-") as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        ranks: dict[int, list[tuple[int, int, int]]] = {int(seed): [] for seed in args.seeds.split(",")}
        for name in args.networks.split(","):
            network = Network(float_file(name, folder), zoo.samples(name, CALIBRATION))
            for seed in ranks:
                ranks[seed] += measure(name, network, seed, figure)
    for seed, found in ranks.items():
        first = [sum(rank[n] == 1 for rank in found) for n in range(3)]
        figure.at_least(f"seed {seed}: damaged layers that are ranked first, of {len(found)}", first[0], len(found))
        figure.row(
            "ranked first", seed=seed, models=len(found), first=first[0], by_own_mse=first[1], by_snr_inside=first[2],
            worst_rank=max(rank[0] for rank in found),
        )  # fmt: skip
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
