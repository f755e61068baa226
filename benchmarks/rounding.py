"""Weights rounded by data: every weight of ResNet8 as int4 per channel, and layers of low-rank inputs beside the official GPTQ.

2,000 CIFAR-10 test images as JPEG, calibrated on 500 training images. Kernels: the default ones (XNNPACK).
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from pathlib import Path

import cifar
import figures
import numpy as np
from resnet8 import MODEL, classes, official

from paring import Recipe, optimize
from paring.compress.rounding import ROUNDERS

ACTIVATIONS = {"float": 2.0, "dynamic": 2.0, "int8": 3.0}  # points that may be lost
GENERATORS = ((128, 16), (512, 64))  # inputs and their rank, as in the notes on the official quantizer
OUTPUTS, SAMPLES = 64, 2048


def recipe(activations: str, rounding: str) -> Recipe:
    """Every weight int4 per channel."""
    four = {
        "weights": "int4",
        "activations": activations,
        "range": "mse",
        "bias_correction": True,
        "rounding": rounding,
    }
    return Recipe.load({"version": 1, "rules": [{"kind": "*", "apply": {"quantize": four}}]})


def layer(figure: figures.Figures, inputs: int, rank: int) -> None:
    """One dense layer whose inputs have a low rank: output error of each rounding."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(SAMPLES, rank)) @ rng.normal(size=(rank, inputs))
    weight = rng.normal(size=(OUTPUTS, inputs))
    scale = np.abs(weight).max(axis=1, keepdims=True) / 7
    second = x.T @ x / len(x)
    second += 0.01 * np.trace(second) / inputs * np.eye(inputs)

    def error(values: np.ndarray) -> float:
        return float(np.linalg.norm(x @ (weight - values).T) / np.linalg.norm(x @ weight.T))

    nearest = error(np.clip(np.rint(weight / scale), -7, 7) * scale)
    figure.row("layers", inputs=inputs, rank=rank, rounding="nearest", error=nearest, of_nearest=1.0, seconds=0.0)
    for name, rounder in ROUNDERS.items():
        started = time.process_time()
        codes = rounder(weight[None], second[None], scale[None], -7, 7, act_order=True, iterations=300)[0]
        spent, found = time.process_time() - started, error(codes * scale)
        figure.row(
            "layers", inputs=inputs, rank=rank, rounding=f"paring {name}", error=found, of_nearest=found / nearest,
            seconds=spent,
        )  # fmt: skip
        if name == "gptq":
            figure.at_most(f"gptq, {inputs} inputs of rank {rank}: error over nearest's", found / nearest, 0.35)
    if (theirs := official_gptq(weight, x)) is not None:
        found = error(theirs)
        figure.row(
            "layers",
            inputs=inputs,
            rank=rank,
            rounding="litert-quantizer GPTQ",
            error=found,
            of_nearest=found / nearest,
        )


def official_gptq(weight: np.ndarray, x: np.ndarray) -> np.ndarray | None:
    """The values that the official quantizer's GPTQ gives, None where it is not installed or has changed."""
    if importlib.util.find_spec("litert_quantizer") is None:
        return None
    from litert_quantizer import qtyping
    from litert_quantizer.algorithms.uniform_quantize import gptq as theirs
    from litert_quantizer.algorithms.uniform_quantize import uniform_quantize_tensor as grids

    per_channel = qtyping.QuantGranularity.CHANNELWISE
    config = qtyping.TensorQuantizationConfig(num_bits=4, symmetric=True, granularity=per_channel)
    scale = np.abs(weight).max(axis=1, keepdims=True) / 7
    start = qtyping.UniformQuantParams(
        scale=scale, zero_point=np.zeros(scale.shape, np.int64), num_bits=4, symmetric=True, quantized_dimension=0
    )
    try:
        done = theirs._apply_gptq(weight.copy(), start, {"hessian": 2 / len(x) * x.T @ x}, config)
        return np.asarray(grids.uniform_dequantize(done.quantized_data, start))
    except (AttributeError, TypeError) as error:  # its inside, which may be another in another version
        print(f"  litert-quantizer's GPTQ could not be called alone: {error}", flush=True)
        return None


def main() -> int:
    args = figures.arguments(__doc__, images=2000, calibration=500)
    figure = figures.Figures(
        "rounding",
        f"ResNet8, every weight int4 per channel; {args.images} CIFAR-10 test images (JPEG), calibrated on {args.calibration} "
        "training images; drop in points with two standard deviations of the paired difference.",
    )
    for inputs, rank in GENERATORS:
        layer(figure, inputs, rank)
    test, calibration = cifar.images("test", args.images), cifar.images("train", args.calibration)
    labels, source = cifar.labels("test", args.images), MODEL.read_bytes()
    truth = classes(source, test)
    right = truth == labels

    def row(tool: str, activations: str, rounding: str, content: bytes, seconds: float) -> float:
        got = classes(content, test)
        change = (got == labels).astype(float) - right
        drop, spread = -100 * float(change.mean()), 200 * float(change.std() / len(change) ** 0.5)
        figure.row(
            "ResNet8", tool=tool, activations=activations, rounding=rounding, top1=float((got == labels).mean()), drop=drop,
            spread=spread, agreement=float((got == truth).mean()), bytes=len(content), seconds=seconds,
        )  # fmt: skip
        return drop

    row("", "float", "", source, 0.0)
    for activations, limit in ACTIVATIONS.items():
        drops = {}
        for rounding in ("nearest", "gptq", "adaround"):
            started = time.perf_counter()
            made = optimize(MODEL, recipe(activations, rounding), calibration, verified=False).model.to_bytes()
            drops[rounding] = row("paring", activations, rounding, made, time.perf_counter() - started)
        best = min(drops["gptq"], drops["adaround"])
        figure.at_most(
            f"all weights int4, {activations} activations: points lost with the better rounding", best, limit
        )
    if importlib.util.find_spec("litert_quantizer"):
        with tempfile.TemporaryDirectory(prefix="rounding-") as folder:
            for name in ("dynamic_wi4_afp32", "weight_only_wi4_afp32"):
                started = time.perf_counter()
                content = official(name, Path(folder))
                row("litert-quantizer", name, "nearest (min-max)", content, time.perf_counter() - started)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
