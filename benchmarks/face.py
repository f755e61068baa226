"""MediaPipe's face detector (float16 weights behind DEQUANTIZE, as shipped on phones): size and error of every output.

Inputs are CIFAR-10 images, bicubic to 128x128, in -1 to 1: 200 to calibrate on, 100 others to measure on.
The yardstick is what int8 weights alone cost, activations float.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import cifar
import figures
import numpy as np

MODEL = figures.SHARED / "models" / "face_detection_short_range.tflite"


def outputs(content: bytes, images: np.ndarray) -> dict[str, np.ndarray]:
    """Every output by name, [images, ...]."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    start, ends = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()
    found: dict[str, list[np.ndarray]] = {d["name"]: [] for d in ends}
    for image in images:
        interpreter.set_tensor(start, image[None])
        interpreter.invoke()
        for d in ends:
            found[d["name"]].append(interpreter.get_tensor(d["index"])[0].astype(np.float64))
    return {name: np.array(values) for name, values in found.items()}


def rounded(source: bytes) -> bytes:
    """The same file with every weight moved onto its int8 grid, per channel, plain min-max in NumPy: the yardstick."""
    from paring import load
    from paring.formats.tflite.constants import shape_of

    data = bytearray(source)
    model = load(data)
    graph = model.subgraphs[0]
    stored = {int(op.outputs[0]): int(op.inputs[0]) for op in graph.operators if model.native(op) == "DEQUANTIZE"}
    for op in graph.operators:
        axis = {"CONV_2D": 0, "DEPTHWISE_CONV_2D": 3}.get(model.native(op))
        if axis is None:
            continue
        tensor = graph.tensors[stored[int(op.inputs[1])]]
        raw = model.constant(tensor)
        assert raw is not None
        weight = raw.view(np.float16).reshape(shape_of(tensor))  # a view into `data`: written in place
        values = weight.astype(np.float64)
        scale = np.abs(values).max(axis=tuple(d for d in range(4) if d != axis), keepdims=True) / 127
        weight[...] = np.rint(values / np.where(scale, scale, 1)) * scale
    return bytes(data)


def main() -> int:
    args = figures.arguments(__doc__, images=100, calibration=200)
    figure = figures.Figures(
        "face",
        f"{MODEL.name}; error = |output - float output| / |float output| over {args.images} images, default kernels; "
        f"{args.calibration} images to calibrate on.",
    )
    from paring import Recipe, optimize

    calibration = cifar.images("train", args.calibration, 128) / np.float32(127.5) - 1
    test = cifar.images("test", args.images, 128) / np.float32(127.5) - 1
    source = MODEL.read_bytes()
    true = outputs(source, test)

    def row(tool: str, name: str, content: bytes, **more: Any) -> dict[str, float]:
        found = outputs(content, test)
        errors = {key: float(np.linalg.norm(found[key] - value) / np.linalg.norm(value)) for key, value in true.items()}
        ratio = len(content) / len(source)
        figure.row("face detector", tool=tool, recipe=name, ratio=ratio, **errors, **more)
        return {"ratio": ratio, **errors}

    yard = row("", "yardstick: int8 weights alone", rounded(source))
    ours = {}
    for name in ("weight-only-int8", "dynamic-int8"):
        made = optimize(MODEL, name, calibration, verified=False)
        ours[name] = row("paring", name, made.model.to_bytes())
    plain = optimize(MODEL, "int8", calibration, verified=False)
    ours["int8"] = row("paring", "int8, min-max", plain.model.to_bytes())
    names = list(dict.fromkeys(op for culprit in plain.report.culprits for op in culprit.operators))
    skip = [f"^{re.escape(name)}$" for name in names]
    mended = optimize(MODEL, Recipe.named("int8").with_settings(range="mse"), calibration, skip=skip, verified=False)
    ours["mended"] = row("paring", f"int8, mse, {len(names)} operators skipped", mended.model.to_bytes())
    for culprit in plain.report.culprits:
        figure.row(
            "culprits of int8, min-max", tensor=culprit.tensor.split(";")[0][-40:], low=culprit.low, high=culprit.high,
            channel_db=culprit.channel_db, operators=len(culprit.operators),
        )  # fmt: skip
    if importlib.util.find_spec("litert_quantizer"):
        from litert_quantizer import quantizer, recipe

        with tempfile.TemporaryDirectory(prefix="face-") as folder:
            for name in ("weight_only_wi8_afp32", "dynamic_wi8_afp32"):
                target = Path(folder) / f"{name}.tflite"
                try:
                    quantizer.Quantizer(str(MODEL), getattr(recipe, name)()).quantize().export_model(str(target))
                    row("litert-quantizer", name, target.read_bytes())
                except Exception as error:
                    figure.note(f"litert-quantizer {name}: {type(error).__name__}: {str(error)[:200]}")
    for name in ("weight-only-int8", "dynamic-int8"):
        figure.at_most(f"{name}: size over the file's", ours[name]["ratio"], 0.65)
        for key in true:
            figure.at_most(f"{name}: error of {key} over that of int8 weights alone", ours[name][key] / yard[key], 1.5)
    for key in true:
        ratio = ours["mended"][key] / ours["int8"][key]
        figure.at_most(f"int8 with culprits skipped and mse: error of {key} over min-max's", ratio, 0.5)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
