"""How ResNet8 is fine-tuned on CIFAR-10 (JPEG), the same for every tool: data, order, augmentation, steps, learning rate.

Framework-free: `training.py` (paring, Keras 3) and `tfmot_twin.py` (tfmot, tf_keras) import it, each in its own environment.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cifar
import figures
import numpy as np

MODEL = figures.SHARED / "models" / "pretrainedResnet.h5"
SEEDS = (0, 1, 2)
STEPS = 500
BATCH = 128
TRAIN, TEST, CALIBRATION = 50_000, 2_000, 512
SHIFT = 4  # pixels, each way
RATE, WARM = 0.001, 0.05  # Adam with its defaults; the share of steps in which the rate rises
COST = (
    "Cost: processor time of five steps of fit at batch 128, one thread, float and each technique in turns in one process; "
    "median, and the middle half of the rounds."
)


def rate(step: int, steps: int = STEPS) -> float:
    """The learning rate of a step: a linear rise, then half a cosine down to a hundredth.

    >>> [round(rate(step, 100), 6) for step in (0, 4, 5, 52, 99)]
    [0.0002, 0.001, 0.001, 0.000513, 1e-05]
    """
    warm = max(round(WARM * steps), 1)
    if step < warm:
        return RATE * (step + 1) / warm
    return RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))))


class Data:
    """The images, decoded once.

    Attributes:
      train: uint8 [50000, 32, 32, 3].
      train_classes: int64 [50000].
      test: float32 [2000, 32, 32, 3], 0 to 255.
      test_classes: int64 [2000].
    """

    def __init__(self) -> None:
        self.train = cifar.images("train", TRAIN, dtype=np.uint8)
        self.train_classes = cifar.labels("train", TRAIN)
        self.test = cifar.images("test", TEST)
        self.test_classes = cifar.labels("test", TEST)

    @property
    def calibration(self) -> np.ndarray:
        """Training images as they are, float32 [512, 32, 32, 3]."""
        return self.train[:CALIBRATION].astype(np.float32)

    def batches(self, seed: int, first: int = 0, last: int = STEPS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Steps `first` to `last` of a seed: images float32 [128, 32, 32, 3] from 0 to 255, classes int64 [128].

        Every image once an epoch, in random order, shifted by up to four pixels and flipped at random. A step's batch does not
        depend on where one starts, so that stages which share the steps see what one long run sees.
        """
        epoch = len(self.train) // BATCH
        order, shown = np.empty(0, int), -1
        for step in range(first, last):
            if step // epoch != shown:
                shown = step // epoch
                order = np.random.default_rng((seed, shown)).permutation(len(self.train))
            chosen = order[step % epoch * BATCH :][:BATCH]
            yield augment(self.train[chosen], np.random.default_rng((seed, shown, step))), self.train_classes[chosen]


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifts (the edge reflected) and flips: uint8 [n, height, width, 3] -> float32, the same shape."""
    count, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="reflect")
    rows = rng.integers(0, 2 * SHIFT + 1, count)[:, None] + np.arange(height)
    columns = rng.integers(0, 2 * SHIFT + 1, count)[:, None] + np.arange(width)
    columns = np.where(rng.random(count)[:, None] < 0.5, columns[:, ::-1], columns)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]].astype(np.float32)


def judged(path: Path, data: Data) -> dict[str, Any]:
    """A written file: its accuracy on the test images (one thread, default kernels), and what its weights are.

    `zeros` is their share in all weights of convolutions and dense layers, `least_zeros` in the fullest of them; `distinct` the
    most different integers in one output channel, `distinct_tensor` in one tensor; `stored` the types in the file.
    """
    from resnet8 import classes

    content = path.read_bytes()
    top1 = float((classes(content, data.test) == data.test_classes).mean())
    return {"top1": top1, "bytes": len(content), "zstd": packed(content), **weights(path)}


def packed(content: bytes) -> int:
    """Bytes after zstd (level 19)."""
    import zstandard

    return len(zstandard.ZstdCompressor(level=19).compress(content))


def weights(path: Path) -> dict[str, Any]:
    """What the weights of convolutions and dense layers in a file are (`judged`)."""
    from paring import load

    graph = load(path).graph
    tensors = [tensor for op in graph.ops for _, tensor in graph.weights_of(op)]
    found = [tensor.weight.read().reshape(tensor.shape[0], -1) for tensor in tensors if tensor.weight is not None]
    return {
        "zeros": sum(int((values == 0).sum()) for values in found) / sum(values.size for values in found),
        "least_zeros": min(float((values == 0).mean()) for values in found),
        "distinct": max(len(np.unique(row)) for values in found for row in values),
        "distinct_tensor": max(len(np.unique(values)) for values in found),
        "stored": "|".join(sorted({tensor.weight.stored for tensor in tensors if tensor.weight is not None})),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over the seeds; of nothing, not-a-number."""
    return {
        "mean": float(np.mean(values)) if len(values) else math.nan,
        "sd": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }


def alternated(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Processor time of each run over that of the one named `float`, taken in turns: median, and the middle half of the rounds.

    Run it with one thread: what others do on the machine then weighs little on either.
    """
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():  # compiles, and fills the caches
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            spent[name].append(time.process_time() - started)
    found = {}
    for name, seconds in spent.items():
        ratios = np.array(seconds) / np.array(spent["float"])
        low, middle, high = np.percentile(ratios, (25, 50, 75))
        found[name] = {
            "ratio": float(middle),
            "low": float(low),
            "high": float(high),
            "seconds": float(np.median(seconds)),
        }
    return found


def about(steps: int, seeds: int) -> str:
    """The protocol in a sentence or two."""
    return (
        f"ResNet8 (top-1 0.758 as it is) fine-tuned on CIFAR-10 as JPEG: {steps} steps of {BATCH} images for every "
        f"technique, stages sharing them; shifts and flips; Adam, {RATE:g} down to a hundredth by half a cosine; up to "
        f"{seeds} seeds, the same data in the same order for every tool; accuracy on 2,000 test images, of the file that is "
        "written, on default kernels."
    )


def summary(figure: figures.Figures, found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, float]:
    """Adds the table of means over the seeds, and gives what each technique loses against float, in points."""
    losses, plain = {}, {row["seed"]: row["top1"] for row in found.get("float", ())}
    for name, rows in found.items():
        over = [100 * (row["top1"] - plain[row["seed"]]) for row in rows if row["seed"] in plain]
        top1, change = spread([row["top1"] for row in rows]), spread(over)
        losses[name] = change["mean"]  # not-a-number without a float twin
        figure.row(
            "ResNet8, mean of the seeds", technique=name, seeds=len(rows), top1=top1["mean"], sd=top1["sd"],
            points_over_float=change["mean"], sd_of_points=change["sd"],
            zeros=min(row["zeros"] for row in rows), distinct=max(row["distinct"] for row in rows),
            bytes=max(row["bytes"] for row in rows), zstd=max(row["zstd"] for row in rows),
        )  # fmt: skip
    return losses
