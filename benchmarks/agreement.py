"""Is what was trained what is shipped? Int8 .tflite files against the Keras models they were exported from.

Trained networks, attached, calibrated, trained for a hundred steps with fake quantization, exported; then 1,000 test images,
put on the grid of the file's input first, through the Keras model as `predict` runs it (the deployed form) and through the
file, on the default kernels (XNNPACK) and on the builtin ones. Values are logits; quanta are steps of the output's grid.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import collections
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import figures
import numpy as np
import trained

RECIPE: dict[str, Any] = {
    "version": 1,
    "rules": [{"kind": "*", "apply": {"quantize": {"weights": "int8", "activations": "int8"}}}],
}
BARS = {"transformer": (0.95, 0.99)}  # values within one quantum, top-1; others:
BAR = (0.99, 0.995)
SLACK = 0.005  # what 1,000 images tell of a share
BATCH = 64


def main() -> int:
    args = figures.arguments(__doc__, networks=",".join(trained.NETWORKS), images=1000, steps=100, calibration=200)
    figure = figures.Figures(
        "agreement",
        f"{args.steps} steps of training with fake quantization, then the written int8 file against the Keras model on "
        f"{args.images} test images: shares of the logits that are the same, or within one step of the output's grid.",
    )
    warnings.simplefilter("ignore")
    for name in args.networks.split(","):
        compare(figure, name, args.images, args.steps, args.calibration)
    return figure.finish(args.write)


def compare(figure: figures.Figures, name: str, images: int, steps: int, calibration: int) -> None:
    """One network: its rows and bars."""
    from paring import training

    model = trained.float_model(name)
    x, classes = trained.samples(name, "train", steps * BATCH)
    test, truth = trained.samples(name, "test", images)
    before = trained.accuracy(trained.logits(model, test), truth)
    training.attach(model, RECIPE, x[:calibration])
    trained.compiled(model, steps, 1e-4)
    model.fit(x, classes, batch_size=BATCH, epochs=1, verbose=0)
    with tempfile.TemporaryDirectory(prefix="agreement-") as folder:
        path = Path(folder, "model.tflite")
        result = training.export(model, path, inputs="int8", outputs="int8")
        test, codes = snapped(path, test)
        wanted = trained.logits(model, test)
        runs = {kernels: run(path, codes, kernels == "builtin") for kernels in ("XNNPACK", "builtin")}
        unnamed, floats = hidden(path, result.report)
    scale = runs["XNNPACK"][1]
    pairs = {
        "XNNPACK": (wanted, runs["XNNPACK"][0]),
        "builtin": (wanted, runs["builtin"][0]),
        "builtin, against XNNPACK": (runs["XNNPACK"][0], runs["builtin"][0]),
    }
    close = {}
    for kernels, (a, b) in pairs.items():
        close[kernels] = row = agreement(a, b, scale)
        figure.row("agreement", network=name, kernels=kernels, **row)
    figure.row(
        "networks",
        network=name,
        operators=len(result.report.rows),
        float_operators=", ".join(f"{n} {count}" for n, count in sorted(floats.items())) or "none",
        unnamed=unnamed,
        top1_float=before,
        top1_keras=trained.accuracy(wanted, truth),
        top1_xnnpack=trained.accuracy(runs["XNNPACK"][0], truth),
        top1_builtin=trained.accuracy(runs["builtin"][0], truth),
    )
    for why in sorted({f"{row.native}: {row.reason}" for row in result.report.rows if row.mode == "float"}):
        figure.note(f"{name}: float {why}")
    within, top1 = BARS.get(name, BAR)
    figure.at_least(
        f"{name}: logits within one quantum of the Keras model, XNNPACK", close["XNNPACK"]["within one"], within
    )
    figure.at_least(f"{name}: same top-1, XNNPACK", close["XNNPACK"]["top1"], top1)
    for what, label in (("within one", "within one quantum"), ("top1", "same top-1")):
        gain = close["builtin"][what] - close["builtin, against XNNPACK"][what]
        figure.at_least(f"{name}: builtin kernels, {label}: against Keras less against XNNPACK", gain, -SLACK)
    figure.at_most(f"{name}: float operators that the report does not name", unnamed, 0)


def agreement(a: np.ndarray, b: np.ndarray, scale: float) -> dict[str, float]:
    """How near two arrays of logits [count, classes] on one grid are, in quanta."""
    quanta = np.abs(np.rint((a - b) / scale))
    return {
        "same": float((quanta == 0).mean()),
        "within one": float((quanta <= 1).mean()),
        "most quanta": int(quanta.max()),
        "top1": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


def snapped(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The samples on the grid of the file's input, as real numbers and as codes."""
    from ai_edge_litert.interpreter import Interpreter

    details = Interpreter(model_path=str(path)).get_input_details()[0]
    scale, zero = details["quantization"]
    if not scale:
        raise SystemExit(f"cannot compare {path.name}: expected an integer input, got {details['dtype'].__name__}.")
    codes = np.clip(np.rint(x / np.float32(scale)) + zero, -128, 127).astype(details["dtype"])
    return (codes.astype(np.float32) - zero) * np.float32(scale), codes


def run(path: Path, codes: np.ndarray, builtin: bool) -> tuple[np.ndarray, float]:
    """Logits as real numbers, float32 [count, classes], and their step."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if builtin else OpResolverType.AUTO
    interpreter = Interpreter(model_path=str(path), num_threads=1, experimental_op_resolver_type=kernels)
    interpreter.allocate_tensors()
    start, end = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scale, zero = end["quantization"]
    found = []
    for sample in codes:
        interpreter.set_tensor(start["index"], sample[None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(end["index"])[0])
    return (np.stack(found).astype(np.float32) - zero) * np.float32(scale), float(scale)


def hidden(path: Path, report: Any) -> tuple[int, dict[str, int]]:
    """How many float operators of the file the report does not name, and all of them by type."""
    import paring
    from paring.formats.tflite.view import view

    graph = view(paring.load(path))
    floats: collections.Counter[str] = collections.Counter()
    for op in graph.ops:
        values = [graph.tensors[t] for t in (*op.inputs, *op.outputs) if t is not None]
        if op.native not in ("QUANTIZE", "DEQUANTIZE") and any(
            v.dtype == "float32" and v.weight is None for v in values
        ):
            floats[op.native] += 1
    named = collections.Counter(row.native for row in report.rows if row.mode == "float")
    return sum((floats - named).values()), dict(floats)


if __name__ == "__main__":
    sys.exit(main())
