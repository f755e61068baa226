"""Clustering ResNet8 after training: what few distinct weights cost in accuracy, and what they save in an archive.

CIFAR-10 test images as JPEG; data are training images without their labels. Sizes are those of the .tflite file as it is,
in a ZIP (deflate, level 9) and behind zstd (level 9).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import cifar
import figures
from resnet8 import MODEL, classes

from paring import optimize
from paring.measure.sizes import stored_bytes, zip_bytes, zstd_bytes

INT8 = {"quantize": {"weights": "int8", "activations": "int8", "bias_correction": True}}
ONE_SCALE = {"quantize": {**INT8["quantize"], "granularity": "tensor"}}
HALF = {"sparsify": {"sparsity": 0.5, "allocation": "error"}}
RECIPES: dict[str, tuple[list[dict[str, object]], bool]] = {
    "8 clusters per channel": ([{"cluster": {"clusters": 8}}], True),
    "16 clusters per channel": ([{"cluster": {"clusters": 16}}], True),
    "16 clusters per channel, without data": ([{"cluster": {"clusters": 16}}], False),
    "16 clusters per tensor": ([{"cluster": {"clusters": 16, "granularity": "tensor"}}], True),
    "32 clusters per tensor": ([{"cluster": {"clusters": 32, "granularity": "tensor"}}], True),
    "int8": ([INT8], True),
    "16 clusters per channel, int8": ([{"cluster": {"clusters": 16}}, INT8], True),
    "32 clusters per tensor, int8 with one scale": (
        [{"cluster": {"clusters": 32, "granularity": "tensor"}}, ONE_SCALE],
        True,
    ),
    "50 % zeros, int8": ([HALF, INT8], True),
    "50 % zeros, 16 clusters per channel, int8": ([HALF, {"cluster": {"clusters": 16}}, INT8], True),
}
"""What is applied to all layers, and whether with data."""


def main() -> int:
    args = figures.arguments(__doc__, images=2000, calibration=128)
    figure = figures.Figures(
        "clustering",
        f"ResNet8 after training, no retraining; {args.images} CIFAR-10 test images (JPEG), {args.calibration} training images "
        "as data; drop in points with two standard deviations of the paired difference.",
    )
    test, data = cifar.images("test", args.images), cifar.images("train", args.calibration)
    labels = cifar.labels("test", args.images)
    right = classes(MODEL.read_bytes(), test) == labels
    drops, sizes = {}, {}
    with tempfile.TemporaryDirectory() as folder:

        def row(what: str, path: Path, got: object) -> None:
            change = got.astype(float) - right
            drops[what], sizes[what] = -100 * float(change.mean()), zip_bytes(path)
            figure.row(
                "sizes", what=what, bytes=stored_bytes(path), zip=sizes[what], zstd=zstd_bytes(path),
                top1=float(got.mean()), drop=drops[what], spread=200 * float(change.std() / len(change) ** 0.5),
            )  # fmt: skip

        row("float", MODEL, right)
        for number, (what, (stages, on_data)) in enumerate(RECIPES.items()):
            path = Path(folder) / f"{number}.tflite"
            rules = {"rules": [{"kind": "*", "apply": stages}]}
            optimize(MODEL, rules, data if on_data else None, output=path, verified=False)
            row(what, path, classes(path.read_bytes(), test) == labels)
    figure.at_most("16 clusters per channel: points lost", drops["16 clusters per channel"], 2.0)
    figure.at_most("32 clusters per tensor: points lost", drops["32 clusters per tensor"], 2.5)
    for what, other, limit in (
        ("16 clusters per channel", "float", 0.35),
        ("32 clusters per tensor", "float", 0.3),
        ("32 clusters per tensor, int8 with one scale", "int8", 0.9),
    ):
        figure.at_most(f"{what}: zip over that of {other}", sizes[what] / sizes[other], limit)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
