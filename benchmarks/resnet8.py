"""ResNet8 on CIFAR-10: what every recipe costs in accuracy, beside the official quantizer and TensorFlow's converter.

2,000 test images as JPEG, calibrated on 200 training images. Kernels: the default ones (XNNPACK).
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import contextlib
import importlib.util
import io
import sys
import tempfile
import warnings
from pathlib import Path

import cifar
import figures
import numpy as np

MODEL = figures.SHARED / "models" / "pretrainedResnet.tflite"
RECIPES = (
    "float16",
    "weight-only-int8",
    "dynamic-int8",
    "int8-int16",
    "int8",
    "int4-int8",
    "weight-only-int4",
    "dynamic-int4",
)
OFFICIAL = ("dynamic_wi8_afp32", "dynamic_legacy_wi8_afp32", "weight_only_wi8_afp32", "dynamic_wi4_afp32")


def classes(content: bytes, images: np.ndarray) -> np.ndarray:
    """The class of each image."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    start, end = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    found = []
    for image in images:
        interpreter.set_tensor(start, image[None])
        interpreter.invoke()
        found.append(int(interpreter.get_tensor(end)[0].argmax()))
    return np.array(found)


def official(name: str, folder: Path) -> bytes:
    """The official quantizer's file of one of its recipes."""
    from litert_quantizer import quantizer, recipe

    made = quantizer.Quantizer(str(MODEL), getattr(recipe, name)())
    made.quantize().export_model(str(folder / f"{name}.tflite"), overwrite=True)
    return (folder / f"{name}.tflite").read_bytes()


def converter(images: np.ndarray) -> bytes:
    """TensorFlow's own int8 file from the Keras model."""
    import zoo

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras

        model = keras.models.load_model(MODEL.with_suffix(".h5"), compile=False)
        return zoo.convert_int8(model, images)


def main() -> int:
    args = figures.arguments(__doc__, images=2000, calibration=200)
    figure = figures.Figures(
        "resnet8",
        f"{args.images} CIFAR-10 test images (JPEG), calibrated on {args.calibration} training images, default "
        "kernels; drop = top-1 of float minus top-1; 2sd = two standard deviations of that paired difference.",
    )
    from paring import optimize

    test, calibration = cifar.images("test", args.images), cifar.images("train", args.calibration)
    labels = cifar.labels("test", args.images)
    source = MODEL.read_bytes()
    truth = classes(source, test)
    right = truth == labels

    def row(tool: str, name: str, content: bytes) -> dict[str, float]:
        got = classes(content, test)
        change = (got == labels).astype(float) - right
        drop, spread = -float(change.mean()), 2 * float(change.std() / len(change) ** 0.5)
        found = {
            "top1": float((got == labels).mean()), "agreement": float((got == truth).mean()), "drop": drop,
            "2sd": spread,
            "lost": int((change < 0).sum()), "gained": int((change > 0).sum()), "bytes": len(content),
            "smaller": len(source) / len(content),
        }  # fmt: skip
        figure.row("ResNet8", tool=tool, recipe=name, **found)
        return found

    row("", "float", source)
    ours = {}
    for name in RECIPES:
        made = optimize(MODEL, name, calibration, verified=False)
        ours[name] = row("paring", name, made.model.to_bytes())
    theirs = {}
    if importlib.util.find_spec("litert_quantizer"):
        with tempfile.TemporaryDirectory(prefix="resnet8-") as folder:
            for name in OFFICIAL:
                theirs[name] = row("litert-quantizer", name, official(name, Path(folder)))
    if importlib.util.find_spec("tensorflow") and importlib.util.find_spec("keras"):
        row("TensorFlow converter", "int8", converter(calibration))
    for name, limit in (("dynamic-int8", 0.97), ("int8-int16", 0.97), ("int8", 0.945)):
        figure.at_least(f"{name}: top-1 agreement with float", ours[name]["agreement"], limit)
        figure.at_most(f"{name}: drop of top-1, at most two standard deviations", ours[name]["drop"], ours[name]["2sd"])
    if theirs:
        gain = ours["dynamic-int4"]["top1"] - theirs["dynamic_wi4_afp32"]["top1"]
        figure.at_least("dynamic-int4: top-1 above the official quantizer's int4", gain, 0.15)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
