"""A folder of images as model input: found, labelled by class folder, resized, mapped onto the input's range."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from paring.errors import InputError, UnsupportedError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def find_images(folder: Path) -> tuple[list[Path], np.ndarray | None]:
    """Lists the images of a folder in a fixed order, with labels when they lie in class folders.

    Labels are the positions of the class folders in sorted order, or their names where all of these are numbers. Files
    that are no images, and hidden ones, are passed over.

    Args:
      folder: Images directly inside, or one subfolder per class.

    Returns:
      Paths, and labels as int64 [images] or None.

    Raises:
      InputError: There is no image, or some lie beside class folders.
    """
    direct = _images(folder)
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if all(path.name.isdecimal() for path in classes):
        classes.sort(key=lambda path: int(path.name))
        codes = [int(path.name) for path in classes]
    else:
        codes = list(range(len(classes)))
    found = [(image, code) for path, code in zip(classes, codes, strict=True) for image in _images(path)]
    if direct and found:
        raise InputError(
            "cannot read the data",
            where=str(folder),
            expected="images either directly inside or in one subfolder per class",
            got=f"both ({direct[0].name} and {found[0][0].relative_to(folder)})",
            todo="Move the loose images away",
        )
    if not direct and not found:
        raise InputError(
            "the data has no samples",
            where=str(folder),
            expected=f"images ({', '.join(sorted(SUFFIXES))}) inside or in one subfolder per class",
            todo="Check the path",
        )
    if direct:
        return direct, None
    return [image for image, _ in found], np.array([code for _, code in found], np.int64)


def _images(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def parse_range(text: str | tuple[float, float]) -> tuple[float, float]:
    """Reads `lo,hi`: the values that pixels 0 and 255 become.

    >>> parse_range("-1,1")
    (-1.0, 1.0)
    """
    parts = text.split(",") if isinstance(text, str) else list(text)
    try:
        low, high = (float(part) for part in parts)
    except (TypeError, ValueError):
        low = high = float("nan")
    if not (np.isfinite([low, high]).all() and low < high):
        raise InputError("bad image range", expected="two numbers lo,hi with lo < hi, such as 0,1", got=repr(text))
    return low, high


class ImageReader:
    """Reads one image as the model wants it.

    Args:
      name: The model's input.
      shape: [batch, height, width, channels] or [batch, channels, height, width]; channels are 1 (grey), 3 (RGB) or
        4 (RGBA).
      dtype: float: pixels are mapped onto `image_range`; uint8, int32, int64: pixels 0 to 255; int8: pixels - 128.
      image_range: Values of pixels 0 and 255, for float inputs.

    Raises:
      UnsupportedError: Pillow is missing.
      InputError: The input is no image, or a float one without a range.

    >>> ImageReader("x", (1, 8, 8, 3), "float32", None)
    Traceback (most recent call last):
    paring.errors.InputError: image range missing for input x: expected the float32 values of pixels 0 and 255. \
Give --image-range lo,hi, such as 0,1 or -1,1 or 0,255.
    """

    def __init__(
        self, name: str, shape: tuple[int, ...], dtype: str, image_range: str | tuple[float, float] | None
    ) -> None:
        layout = _layout(shape)
        if layout is None or dtype not in ("float16", "float32", "float64", "uint8", "int8", "int32", "int64"):
            raise InputError(
                "a folder of images does not fit",
                where=f"input {name}",
                expected="an image input [batch, height, width, 1, 3 or 4 channels] of known size",
                got=f"{dtype}{list(shape)}",
                todo="Give the data as .npz or module:function",
            )
        self._first, height, width, channels = layout
        self._size = (width, height)
        self._mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
        self._dtype = np.dtype(dtype)
        self._range = parse_range(image_range) if image_range is not None else None
        if self._dtype.kind == "f" and self._range is None:
            raise InputError(
                "image range missing",
                where=f"input {name}",
                expected=f"the {dtype} values of pixels 0 and 255",
                todo="Give --image-range lo,hi, such as 0,1 or -1,1 or 0,255",
            )
        try:
            self._pillow: Any = importlib.import_module("PIL.Image")
        except ImportError as error:
            raise UnsupportedError(
                "Pillow is not installed: reading images needs it", todo='Install it: pip install "paring[images]"'
            ) from error

    def read(self, path: Path) -> np.ndarray:
        """One image without the batch dimension, resized with a bicubic filter where its size differs.

        Raises:
          InputError: The file is broken.
        """
        try:
            with self._pillow.open(path) as image:
                image = image.convert(self._mode)
                if image.size != self._size:
                    image = image.resize(self._size, self._pillow.Resampling.BICUBIC)
                pixels = np.asarray(image)
        except (OSError, ValueError, SyntaxError, self._pillow.DecompressionBombError) as error:
            raise InputError(
                "cannot read the image", where=str(path), got=str(error).splitlines()[0], todo="Mend or remove it"
            ) from error
        pixels = pixels.reshape(self._size[1], self._size[0], -1)
        pixels = pixels.transpose(2, 0, 1) if self._first else pixels
        if self._dtype.kind == "f" and self._range:
            low, high = self._range
            return (pixels * np.float64((high - low) / 255) + low).astype(self._dtype)
        if self._dtype == np.int8:
            return (pixels.astype(np.int16) - 128).astype(np.int8)
        return pixels.astype(self._dtype)


def _layout(shape: tuple[int, ...]) -> tuple[bool, int, int, int] | None:
    """Whether channels come first, height, width, channels; None when this is no image."""
    if len(shape) == 4 and shape[3] in (1, 3, 4) and min(shape[1:3]) > 0:
        return False, shape[1], shape[2], shape[3]
    if len(shape) == 4 and shape[1] in (1, 3, 4) and min(shape[2:]) > 0:
        return True, shape[2], shape[3], shape[1]
    return None
