"""Three ways to ask which layer hurts, on one model: paring, the official quantizer's `validate`, TensorFlow's debugger.

ResNet8 in static int8, CIFAR-10 images (JPEG). Each tool runs in fresh processes, in turns, on the files and images that it
wants: paring and `validate` compare a float file with an int8 one, TensorFlow's debugger converts the Keras model itself.
"debugging" is the part of the process that makes and runs the comparison; everything before it is done by then.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import contextlib
import io
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cifar
import figures
import numpy as np

TOOLS = ("paring", "litert-quantizer", "TensorFlow")
SHOWS = {
    "paring": "accumulated, own and added error of a layer: SNR, median channel, MSE/scale2, cosine, clipped; histograms; "
    "outputs, top-1 agreement; ranking, culprit, recipe lines",
    "litert-quantizer": "accumulated error of every tensor: one or several of MSE, median ratio, cosine, KL, SNR",
    "TensorFlow": "own error of a layer fed with the float input: mean, deviation, largest, mean square error, range; or, "
    "in another mode, of whole models",
}


def _paring(folder: Path) -> Callable[[], dict[str, Any]]:
    from paring import compare

    images = np.load(folder / "images.npy")

    def run() -> dict[str, Any]:
        found = compare(folder / "float.tflite", folder / "int8.tflite", images)
        return {"layers": len(found.ranking), "matched": sum(bool(layer.optimized) for layer in found.layers)}

    return run


def _official(folder: Path) -> Callable[[], dict[str, Any]]:
    from litert_quantizer import model_validator
    from litert_quantizer.utils import validation_utils

    from paring import load
    from paring.formats.tflite.view import entries

    images = np.load(folder / "images.npy")
    [(key, (_, inputs, _))] = entries(load(folder / "float.tflite")).items()
    files = [bytearray((folder / name).read_bytes()) for name in ("float.tflite", "int8.tflite")]
    metric = validation_utils.ValidationErrorMetric

    def run() -> dict[str, Any]:
        data = {key: [{next(iter(inputs)): image[None]} for image in images]}
        # What Quantizer.validate calls; itself it takes only models that it quantized in the same process.
        found = model_validator.compare_model(
            files[0], files[1], data, [metric.MSE, metric.SNR, metric.COSINE_SIMILARITY]
        )
        return {"layers": len(found.get_all_tensor_results()), "matched": 0}

    return run


def _tensorflow(folder: Path) -> Callable[[], dict[str, Any]]:
    import keras
    import tensorflow as tf
    import zoo

    images = np.load(folder / "images.npy")
    model = keras.models.load_model(zoo.RESNET8, compile=False)

    def run() -> dict[str, Any]:
        converter = zoo.int8_converter(model, np.load(folder / "calibration.npy"))
        debugger = tf.lite.experimental.QuantizationDebugger(
            converter=converter, debug_dataset=lambda: ([image[None]] for image in images)
        )
        debugger.run()
        return {"layers": len(debugger.layer_statistics), "matched": 0}

    return run


RUNS = dict(zip(TOOLS, (_paring, _official, _tensorflow), strict=True))


def child(tool: str, folder: Path) -> None:
    """One run in this process; prints what it took."""
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run = RUNS[tool](folder)
        start, cpu = time.perf_counter(), _cpu()
        found = run()
        found |= {"debugging_s": time.perf_counter() - start, "debugging_cpu_s": _cpu() - cpu}
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    # The largest of its children stands for all: paring has one, the others none.
    found |= {"process_cpu_s": _cpu(), "peak_MB": sum(peaks) / 1000}
    print(json.dumps(found))


def _cpu() -> float:
    """Seconds of processor time, of ended children too."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def prepare(folder: Path, images: int, calibration: int) -> None:
    """The float file, the int8 file made of it, and the images."""
    import zoo

    from paring import optimize

    np.save(folder / "images.npy", cifar.images("test", images))
    np.save(folder / "calibration.npy", cifar.images("train", calibration))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (folder / "float.tflite").write_bytes(zoo.convert_float(zoo.build("resnet8")))
    data = np.load(folder / "calibration.npy")
    optimize(folder / "float.tflite", "int8", data, output=folder / "int8.tflite", overwrite=True, verified=False)


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], Path(sys.argv[3]))
        return 0
    if sys.argv[1:2] == ["--prepare"]:
        prepare(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
        return 0
    args = figures.arguments(__doc__, images=50, calibration=100, rounds=5)
    figure = figures.Figures(
        "debuggers",
        f"ResNet8, static int8, {args.images} images, median of {args.rounds} fresh processes of each tool, in turns; "
        "peak_MB is resident memory, of paring with its child process; debugging is without imports and loading.",
    )
    with tempfile.TemporaryDirectory(prefix="debuggers-") as temporary:
        folder = Path(temporary)
        # In a process of its own: Linux counts what a parent holds towards the peak of its children.
        command = [sys.executable, __file__, "--prepare", str(folder), str(args.images), str(args.calibration)]
        subprocess.run(command, check=True, capture_output=True)
        taken: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS}
        for _ in range(args.rounds):
            for tool in TOOLS:
                start = time.perf_counter()
                command = [sys.executable, __file__, "--child", tool, str(folder)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{tool} failed: {done.stderr[-2000:]}")
                found = json.loads(done.stdout.splitlines()[-1])
                taken[tool].append({**found, "process_s": time.perf_counter() - start})
    for tool, runs in taken.items():
        keys = ("debugging_s", "debugging_cpu_s", "process_s", "process_cpu_s", "peak_MB")
        middle = {key: float(np.median([run[key] for run in runs])) for key in keys}
        spread = float(np.ptp([run["debugging_s"] for run in runs]))
        figure.row("ResNet8", tool=tool, rows=runs[0]["layers"], **middle, spread_s=spread, shows=SHOWS[tool])
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
