"""The model and the data of `paring demo`: a small residual network that reads handwritten digits.

`tools/train_digits.py` makes both files from scikit-learn's digits (UCI "Optical recognition of handwritten digits").
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

SIZE = 32
"""Height and width, in pixels, of the images that the model takes."""

LEVELS = 16
"""The largest value of a pixel of the original 8x8 images."""

_FOLDER = Path(__file__).parent


def model_path() -> Path:
    """The float32 `.tflite` file: one image [1, 32, 32, 1] in, the probabilities of ten digits [1, 10] out.

    >>> model_path().name
    'digits.tflite'
    """
    return _FOLDER / "digits.tflite"


def data_path() -> Path:
    """The `.npz` file with `calibration`, `images` (both uint8 [N, 8, 8], values 0 to 16) and `labels`.

    >>> data_path().name
    'digits.npz'
    """
    return _FOLDER / "digits.npz"


def upscale(images: np.ndarray) -> np.ndarray:
    """Turns the original small images into what the model takes: bilinear, pixel centers at one half, edges repeated.

    Args:
      images: uint8 [N, 8, 8] with values 0 to 16.

    Returns:
      float32 [N, 32, 32, 1] in [0, 1].

    >>> upscale(np.full((2, 8, 8), 16, np.uint8)).mean(axis=(1, 2, 3))
    array([1., 1.], dtype=float32)
    """
    rows, columns = (_interpolation(side) for side in images.shape[1:3])
    # float64 until the end: the same bytes whatever order the matrix product of a platform sums in.
    values = rows @ (images.astype(np.float64) / LEVELS) @ columns.T
    return values.astype(np.float32)[..., np.newaxis]


def load_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The calibration images, the held-out images and their labels; the model has seen no held-out image.

    Returns:
      float32 [200, 32, 32, 1], float32 [N, 32, 32, 1] and uint8 [N].

    >>> [array.shape for array in load_digits()]
    [(200, 32, 32, 1), (599, 32, 32, 1), (599,)]
    """
    with np.load(data_path(), allow_pickle=False) as data:
        return upscale(data["calibration"]), upscale(data["images"]), data["labels"]


def _interpolation(side: int) -> np.ndarray:
    """float64 [SIZE, side]: the share of each source pixel in each of the `SIZE` output pixels."""
    centers = (np.arange(SIZE) + 0.5) * side / SIZE - 0.5
    distance = np.abs(np.clip(centers, 0, side - 1)[:, np.newaxis] - np.arange(side))
    return np.maximum(0.0, 1.0 - distance)
