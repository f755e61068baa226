"""Static int8 beside TensorFlow's converter: ten networks, the same float file, the same samples, the same kernels.

(a) With the converter's own calibration ranges our file has to be its twin. (b) With ours it has to be as good.
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
from pathlib import Path
from typing import Any

import figures
import numpy as np
import zoo

from paring import load, optimize
from paring.calibration import Statistics, TensorStatistics
from paring.formats.tflite.constants import constant_weight, quantization_of, type_name
from paring.formats.tflite.model import TfliteModel

CALIBRATION = 8
RESOLVERS = {"xnnpack": "AUTO", "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES"}
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


def conversions(name: str, folder: Path) -> dict[str, bytes]:
    """The converter's float file, the same with its calibration ranges, and its int8 file; kept in `folder`."""
    files = {kind: folder / f"{name}.{kind}.tflite" for kind in ("float", "calib", "int8")}
    if not all(path.is_file() for path in files.values()):
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, samples = zoo.build(name), zoo.samples(name, CALIBRATION)
            files["float"].write_bytes(zoo.convert_float(model))
            files["int8"].write_bytes(zoo.convert_int8(model, samples))
            converter = zoo.int8_converter(model, samples)
            converter._experimental_calibrate_only = True
            files["calib"].write_bytes(converter.convert())
    return {kind: path.read_bytes() for kind, path in files.items()}


def converter_statistics(calibrated: bytes) -> Statistics:
    """The ranges that the converter recorded: min and max of every computed tensor of its calibrate-only file."""
    model = load(calibrated)
    tensors, names = {}, {}
    for index, tensor in enumerate(model.subgraphs[0].tensors):
        q = tensor.quantization
        if q is not None and q.min is not None and q.min.size:
            tensors[0, index] = TensorStatistics(float(q.min[0]), float(q.max[0]), 1)
            names[0, index] = tensor.name or f"tensor{index}"
    return Statistics(tensors, names, CALIBRATION)


def outputs(content: bytes, samples: np.ndarray, resolver: str) -> np.ndarray:
    """Runs samples one by one -> the first output, [samples, ...]."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=OpResolverType[resolver])
    interpreter.allocate_tensors()
    start, end = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    found = []
    for sample in samples:
        interpreter.set_tensor(start, sample[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(end)[0])
    return np.array(found)


def output_scale(model: TfliteModel) -> float:
    """The scale of the integers behind the first output."""
    graph = model.subgraphs[0]
    end = int(graph.outputs[0])
    maker = next(op for op in graph.operators if end in [int(i) for i in op.outputs])
    tensor = graph.tensors[int(maker.inputs[0]) if model.native(maker) == "DEQUANTIZE" else end]
    grid = quantization_of(model, graph, tensor)
    return float(grid.scale[0]) if grid is not None else 1.0


def constants(ours: TfliteModel, theirs: TfliteModel) -> tuple[int, int, list[str]]:
    """(constants and grids that are bit-equal, all, the first that differ), operator by operator."""
    kept = [[op for op in m.subgraphs[0].operators if m.native(op) not in _CONVERSIONS] for m in (ours, theirs)]
    kinds = [[m.native(op) for op in ops] for m, ops in zip((ours, theirs), kept, strict=True)]
    if kinds[0] != kinds[1]:
        return 0, 1, [f"operators differ: {len(kinds[0])} and {len(kinds[1])}"]
    same, total, different = 0, 0, []
    for number, (a, b) in enumerate(zip(*kept, strict=True)):
        for side in ("inputs", "outputs"):
            for place, (i, j) in enumerate(zip(getattr(a, side), getattr(b, side), strict=True)):
                if i < 0 or j < 0:
                    continue
                total += 1
                x, y = (_stored(m, int(k)) for m, k in ((ours, i), (theirs, j)))
                if len(x) == len(y) and all(np.array_equal(p, q) for p, q in zip(x, y, strict=True)):
                    same += 1
                else:
                    different.append(f"{kinds[0][number]} {number} {side}[{place}]")
    return same, total, different[:5]


def _stored(model: TfliteModel, index: int) -> list[Any]:
    graph = model.subgraphs[0]
    tensor = graph.tensors[index]
    grid, weight = quantization_of(model, graph, tensor), constant_weight(model, tensor)
    found: list[Any] = [np.array([type_name(tensor)])]
    found += [] if grid is None else [grid.scale, grid.zero_point, np.array([grid.axis or 0])]
    return found + ([] if weight is None else [np.asarray(weight.read())])


def measure(name: str, folder: Path, count: int, figure: figures.Figures) -> None:
    """Both comparisons of one network."""
    files = conversions(name, folder)
    samples = zoo.samples(name, count)
    theirs = load(files["int8"])
    scale = output_scale(theirs)
    shape, _, _ = zoo.INPUTS[name]
    ours = {
        "a: converter's ranges": optimize(
            files["float"], "int8", statistics=converter_statistics(files["calib"]), verified=False
        ),
        "b: our calibration": optimize(
            files["float"], "int8", samples[:CALIBRATION].reshape(CALIBRATION, *shape), verified=False
        ),
    }
    content = {key: result.model.to_bytes() for key, result in ours.items()}
    for kernels, resolver in RESOLVERS.items():
        exact = outputs(files["float"], samples, resolver).astype(np.float64)
        right = outputs(files["int8"], samples, resolver).astype(np.float64)
        norm = np.linalg.norm(exact)
        for key, result in ours.items():
            got = outputs(content[key], samples, resolver).astype(np.float64)
            quanta = np.abs(np.rint(got / scale) - np.rint(right / scale))
            error, wanted = np.linalg.norm(got - exact) / norm, np.linalg.norm(right - exact) / norm
            equal, total, different = constants(result.model, theirs)
            figure.row(
                key, network=name, kernels=kernels, same=float((quanta == 0).mean()),
                within_one=float((quanta <= 1).mean()), max_quanta=int(quanta.max()), error_ours=float(error),
                error_converter=float(wanted),
                error_ratio=float(error / wanted), constants_equal=f"{equal}/{total}",
            )  # fmt: skip
            if different and key[0] == "a":
                figure.note(f"{name}: differ: {', '.join(different)}")


def main() -> int:
    args = figures.arguments(__doc__, networks=",".join(zoo.NAMES), samples=40, keep="")
    figure = figures.Figures(
        "converter_twin",
        f"named recipe int8 (range minmax) from the converter's float file, calibrated on {CALIBRATION} samples; "
        f"outputs on {args.samples} samples against the converter's int8 file on the same kernels; "
        "error = |int8 - float| / |float|.",
    )
    with tempfile.TemporaryDirectory(prefix="twin-") as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.networks.split(","):
            measure(name, folder, args.samples, figure)
    for key, rows in list(figure.tables.items()):
        for kernels in RESOLVERS:
            here = [row for row in rows if row["kernels"] == kernels]
            if key[0] == "a":
                least = min(here, key=lambda row: row["within_one"])
                figure.at_least(
                    f"{key}, {kernels}: least share within one quantum ({least['network']})", least["within_one"], 0.999
                )
            most = max(here, key=lambda row: row["error_ratio"])
            figure.at_most(
                f"{key}, {kernels}: largest error over the converter's ({most['network']})", most["error_ratio"], 1.05
            )
            middle = float(np.exp(np.mean([np.log(row["error_ratio"]) for row in here])))
            figure.row("error over the converter's, geometric mean", ranges=key, kernels=kernels, ratio=middle)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
