"""`paring bench A A`, again and again: how far from 1 are the ratios of a model to itself.

Every run is the command as a user types it, in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import cifar
import figures
import numpy as np

LOW, HIGH = 0.97, 1.03
RESNET = figures.SHARED / "models" / "pretrainedResnet.tflite"
COMMAND = "from paring.cli import main; main()"


def run(model: Path, data: Path, folder: Path, options: list[str]) -> dict:
    """What one `paring bench A A --data D` writes."""
    results = folder / "results.json"
    arguments = ["bench", str(model), str(model), "--data", str(data), "--results", str(results), *options]
    subprocess.run([sys.executable, "-c", COMMAND, *arguments], check=True, capture_output=True)
    return json.loads(results.read_text(encoding="utf-8"))


def ratios(model: dict) -> dict[str, float]:
    """Every ratio of a model to the first, by what it is of."""
    found = {key: model[key]["ratio"] for key in ("bytes", "zip", "zstd", "memory", "score")}
    found |= {f"latency, {t['threads']} thread{'s' * (t['threads'] > 1)}": t["ratio"] for t in model["latency"]}
    return {key: float("nan") if value is None else value for key, value in found.items()}


def main() -> int:
    args = figures.arguments(__doc__, runs=10, images=500, seconds=60.0, rounds=100)
    figure = figures.Figures(
        "bench_same",
        f"`paring bench A A` {args.runs} times: the ratios of the second A to the first; {args.images} labelled images.",
    )
    from paring.demo import load_digits, model_path

    _, digits, labels = load_digits()
    jobs = {"digits": (model_path(), digits[: args.images], labels[: args.images])}
    if RESNET.exists():
        jobs["ResNet8"] = (RESNET, cifar.images("test", args.images), cifar.labels("test", args.images))
    else:
        figure.note(f"no ResNet8 in {RESNET.parent}: left out")
    options = ["--seconds", str(args.seconds), "--rounds", str(args.rounds)]
    with tempfile.TemporaryDirectory(prefix="bench-same-") as name:
        for model, (path, images, answers) in jobs.items():
            data, seen = Path(name) / f"{model}.npz", []
            np.savez(data, images=images, labels=answers)
            for number in range(args.runs):
                found = run(path, data, Path(name), options)
                second = found["models"][1]
                seen.append(ratios(second))
                one, *more = second["latency"]
                figure.row(
                    model, run=number + 1, **seen[-1], launches=one["launches"], load=found["environment"]["load"],
                    **{f"+-, {t['threads']}": t["error"] for t in (one, *more)}, ms=one["median_ms"],
                )  # fmt: skip
            for key in seen[0]:
                figure.at_least(f"{model}: lowest ratio of {key}", min(r[key] for r in seen), LOW)
                figure.at_most(f"{model}: highest ratio of {key}", max(r[key] for r in seen), HIGH)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
