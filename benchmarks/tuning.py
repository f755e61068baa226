"""`paring tune` on ResNet8: at most 1 point lost, tuned on training images, judged on test images that it never saw."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import cifar
import figures
from resnet8 import MODEL, classes

from paring import tune


def main() -> int:
    args = figures.arguments(__doc__, images=2000, calibration=4000)
    figure = figures.Figures(
        "tuning",
        f"ResNet8, --max-drop 1pt, tuned on {args.calibration} CIFAR-10 training images (JPEG), twice: every fourth, up to "
        f"256, calibrated on, the others measured on; judged on {args.images} test images. Drops in points.",
    )
    test, labels = cifar.images("test", args.images), cifar.labels("test", args.images)
    train, answers = cifar.images("train", 2 * args.calibration), cifar.labels("train", 2 * args.calibration)
    source = MODEL.read_bytes()
    before = classes(source, test) == labels
    for number in range(2):  # the second time on images that nothing was ever tried on
        part = slice(number * args.calibration, (number + 1) * args.calibration)
        with tempfile.TemporaryDirectory(prefix="tuning-") as name:
            out = Path(name) / "tuned.tflite"
            found = tune(MODEL, {"input_1": train[part]}, labels=answers[part], output=out, max_drop="1pt")
            content = out.read_bytes()
        told = found.tuning
        for candidate in sorted(told.candidates, key=lambda c: c.bytes):
            figure.row(
                f"candidates, part {number + 1}", model=candidate.label, bytes=candidate.bytes,
                smaller=told.before.bytes / candidate.bytes, top1=candidate.score, drop=candidate.drop,
                latency_ms=candidate.latency_ms, front=candidate.pareto, chosen=candidate.chosen,
            )  # fmt: skip
        change = (classes(content, test) == labels).astype(float) - before
        drop, spread = -100 * float(change.mean()), 200 * float(change.std() / len(change) ** 0.5)
        smaller = len(source) / len(content)
        chosen = next(c for c in told.candidates if c.chosen)
        figure.row(
            "chosen", part=number + 1, model=chosen.label, smaller=smaller, drop_tuned_on=chosen.drop, drop_held_out=drop,
            two_sd=spread, seconds=told.seconds, trials=len(told.candidates) + len(told.sensitivity),
        )  # fmt: skip
        figure.at_least(f"part {number + 1}: times smaller than float", smaller, 5.7)
        figure.at_most(f"part {number + 1}: points lost on held-out images", drop, 1.0)
        figure.at_most(f"part {number + 1}: minutes on 2 cores", told.seconds / 60, 5.0)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
