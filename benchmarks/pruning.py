"""Pruning ResNet8 in one shot: what zeros cost in accuracy, chosen on data and by magnitude.

CIFAR-10 test images as JPEG; pruned on training images without their labels. Kernels: the default ones (XNNPACK), dense: this
measures accuracy, not speed.
"""

from __future__ import annotations

import sys
import time

import cifar
import figures
import numpy as np
from resnet8 import MODEL, classes

from paring import optimize
from paring.formats import load
from paring.formats.tflite.view import view
from paring.measure.cost import cost

PATTERNS = ("unstructured", "4x1", "16x1")
SHARES = (0.5, 0.7, 0.8, 0.9)
LEAST = 4096  # weights of a layer that is pruned
BARS = {("unstructured", 0.5): 2.0, ("unstructured", 0.7): 5.0, ("4x1", 0.5): 5.0, ("16x1", 0.5): 8.0}  # points lost


def recipe(pattern: str, share: float, allocation: str, mend: bool = True) -> dict[str, object]:
    """Large layers pruned, the others fitted to what they read behind them."""
    common = {"sparsity": share, "pattern": pattern, "allocation": allocation, "mend": mend, "min_size": LEAST}
    return {"rules": [{"kind": "*", "apply": {"sparsify": common}}]}


def main() -> int:
    args = figures.arguments(__doc__, images=2000, calibration=512)
    figure = figures.Figures(
        "pruning",
        f"ResNet8, the four layers with {LEAST} weights or more pruned in one shot; {args.images} CIFAR-10 test images "
        f"(JPEG), pruned on {args.calibration} training images; drop in points with two standard deviations of the paired "
        "difference.",
    )
    test, calibration = cifar.images("test", args.images), cifar.images("train", args.calibration)
    labels, source = cifar.labels("test", args.images), MODEL.read_bytes()
    truth = classes(source, test)
    right = truth == labels
    figure.row("float", top1=float(right.mean()), bytes=len(source))

    def row(table: str, how: str, pattern: str, share: float, content: bytes, seconds: float) -> float:
        got = classes(content, test)
        change = (got == labels).astype(float) - right
        drop, spread = -100 * float(change.mean()), 200 * float(change.std() / len(change) ** 0.5)
        figure.row(
            table, pattern=pattern, sparsity=share, how=how, top1=float((got == labels).mean()), drop=drop, spread=spread,
            agreement=float((got == truth).mean()), seconds=seconds,
        )  # fmt: skip
        return drop

    def made(said: dict[str, object], data: np.ndarray | None) -> tuple[bytes, float]:
        started = time.perf_counter()
        result = optimize(MODEL, said, data, verified=False)
        return result.model.to_bytes(), time.perf_counter() - started

    shown = False
    for pattern in PATTERNS:
        for share in SHARES:
            plain = row("accuracy", "magnitude", pattern, share, *made(recipe(pattern, share, "uniform"), None))
            alone = made(recipe(pattern, share, "uniform", mend=False), calibration)
            row("accuracy", "on data, same share everywhere, others left alone", pattern, share, *alone)
            ours = row(
                "accuracy", "on data (default)", pattern, share, *made(recipe(pattern, share, "error"), calibration)
            )
            if not shown:
                _pruned(figure, load(alone[0]))
                shown = True
            figure.at_most(f"{pattern} {share:.0%}: points lost over those of magnitude", ours / plain, 0.75)
            if (limit := BARS.get((pattern, share))) is not None:
                figure.at_most(f"{pattern} {share:.0%}: points lost", ours, limit)
    both = recipe("16x1", 0.7, "error")
    quantize = {"quantize": {"weights": "int8", "activations": "int8"}}
    both["rules"] = [{"kind": "*", "apply": [both["rules"][0]["apply"], quantize]}]
    row("accuracy", "on data (default), then int8", "16x1", 0.7, *made(both, calibration))
    return figure.finish(args.write)


def _pruned(figure: figures.Figures, model: object) -> None:
    """The layers that were pruned, with their share of the work."""
    graph = view(model)
    costs = {op.name: cost(graph, op) for op in graph.ops if not op.constant}
    total = sum(found.macs for found in costs.values())
    for name, found in costs.items():
        if found.zeros is not None and found.zeros > 0.1:
            figure.row("pruned layers", layer=name.split(";")[0], weights=found.parameters, macs=found.macs / total)


if __name__ == "__main__":
    sys.exit(main())
