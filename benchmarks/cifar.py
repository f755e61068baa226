"""CIFAR-10 as JPEG files (`$PARING_SHARED/data`), for the benchmarks."""

from __future__ import annotations

import io
from itertools import pairwise

import figures
import numpy as np


def images(part: str, count: int, size: int = 32, dtype: type[np.generic] = np.float32) -> np.ndarray:
    """The first `count` images of `train` or `test` -> [count, size, size, 3], 0 to 255; bicubic."""
    from PIL import Image

    with np.load(figures.SHARED / "data" / "cifar10_jpeg.npz") as data:
        raw, offsets = data[f"{part}_jpeg"], data[f"{part}_offsets"]
    found = []
    for start, stop in pairwise(offsets[: count + 1]):
        image = Image.open(io.BytesIO(raw[start:stop].tobytes())).convert("RGB")
        if image.size != (size, size):
            image = image.resize((size, size), Image.Resampling.BICUBIC)
        found.append(np.asarray(image, dtype))
    return np.stack(found)


def labels(part: str, count: int) -> np.ndarray:
    """Their classes, int64 [count]."""
    with np.load(figures.SHARED / "data" / "cifar10_jpeg.npz") as data:
        return data[f"{part}_y"][:count].astype(np.int64)
