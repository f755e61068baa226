"""Data in, samples out: `.npz`, `.npy`, a folder of images, `module:function`, arrays or an iterable.

A sample is `{input name: array}` with the input's full shape, its batch included.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from paring.errors import InputError
from paring.named import find
from paring.samples import feeds, streams
from paring.samples.arrays import read_npy, read_npz
from paring.samples.images import ImageReader, find_images


@dataclass(frozen=True)
class TensorSpec:
    """One model input: `shape` holds -1 where a dimension is dynamic, `dtype` is a NumPy name or `string`."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def batch(self) -> int:
        """Rows of one sample: the first dimension, 1 where it is dynamic or there is none."""
        return self.shape[0] if self.shape and self.shape[0] > 0 else 1


Sample: TypeAlias = dict[str, np.ndarray]
Signature: TypeAlias = Mapping[str, TensorSpec] | Sequence[TensorSpec]


class Samples:
    """Samples that can be read again and again; each pass checks shapes, dtypes and finite values as it goes.

    Attributes:
      source: What errors call the data.
      notes: What was left out, e.g. rows that do not fill the model's batch.
    """

    def __init__(
        self,
        source: str,
        read: Callable[[], Iterator[feeds.Row]],
        *,
        count: int | None = None,
        labels: np.ndarray | None = None,
        limit: int | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        """Wraps a reader that starts a new pass at each call; `count` and `labels` come after the first where None."""
        self.source = source
        self.notes = notes
        self._read = read
        self._count = count
        self._labels = labels
        self._limit = limit
        self._whole = count is not None

    def __iter__(self) -> Iterator[Sample]:
        """A new pass.

        Raises:
          InputError: A sample is wrong, the labels do not match, or the source gives less than in its first pass.
        """
        own: list[np.ndarray] = []
        number = rows = 0
        for inputs, label in self._read():
            number += 1
            if label is not None and not self._whole:
                own.append(label)
            rows += next((array.shape[0] for array in inputs.values() if array.ndim), 1)
            yield inputs
        if self._whole and number != self._count:
            raise InputError(
                "the data changed between two passes",
                where=self.source,
                expected=f"{self._count} samples again",
                got=str(number),
                todo="Let the function or the iterable start anew each time, and give the same samples",
            )
        if not self._whole:
            cut = number == self._limit
            self._labels = _stream_labels(self._labels, own, number, rows, cut, self.source)
            self._count, self._whole = number, True

    @property
    def count(self) -> int | None:
        """Number of samples, None as long as a streaming source was not read to its end."""
        return self._count

    @property
    def labels(self) -> np.ndarray | None:
        """Labels [rows, ...], one per row of the samples in order; None without any.

        A streaming source is read to its end for them if it was not yet.
        """
        if not self._whole:
            for _ in self:
                pass
        return self._labels


def open_samples(
    data: Any,
    signature: Signature,
    *,
    labels: Any = None,
    image_range: str | tuple[float, float] | None = None,
    limit: int | None = None,
    signature_name: str | None = None,
) -> Samples:
    """Opens data for a model's inputs.

    Arrays hold rows along axis 0 and are cut into the model's batch (1 where it is dynamic); an array with one
    dimension more than the input holds whole inputs. Files are memory-mapped and generators spooled to disk, so that
    memory stays bounded. Numbers are taken as they are: nothing is scaled, quantized or shuffled. A stream's batch of
    several is cut where the model's batch is fixed, and kept where it is dynamic.

    Args:
      data: `.npz` or `.npy` file, folder of images, `module:function`; or an array, a dict of arrays, a tuple `(arrays,
        labels)`, an iterable (generator, tf.data.Dataset, list) or a callable that returns one. Items are `inputs` or
        `(inputs, label)`; inputs are an array, a dict by name, or a tuple in order.
      signature: The model's inputs, by name or in order.
      labels: `.npy` file or array; wins over labels in the data.
      image_range: `lo,hi`, the values of pixels 0 and 255 of a folder of images for a float input.
      limit: At most so many samples.
      signature_name: Which signature of several this is: `.npz` keys may then read `signature/input`.

    Raises:
      InputError: The data is missing, empty, or does not fit; the message says what fits.

    >>> spec = TensorSpec("x", (1, 3), "float32")
    >>> samples = open_samples(np.arange(6, dtype=np.uint8).reshape(2, 3), [spec])
    >>> [sample["x"].tolist() for sample in samples]
    [[[0.0, 1.0, 2.0]], [[3.0, 4.0, 5.0]]]
    """
    if isinstance(data, Samples):
        return data
    specs = feeds.by_name(signature)
    if limit is not None and limit < 1:
        raise InputError("bad limit", expected="1 sample or more", got=str(limit))
    source, path = _describe(data), _path(data)
    if image_range is not None and not (path and path.is_dir()):
        raise InputError("image range is of no use", where=source, expected="a folder of images")
    if path and path.is_dir():
        return _from_folder(path, specs, _open_labels(labels), image_range, limit)
    if path:
        data = read_npz(path) if path.suffix == ".npz" else read_npy(path)
    elif isinstance(data, (str, os.PathLike)):
        data = find(str(data))
    start = None
    if callable(data) and not isinstance(data, Iterable):
        start, data = data, streams.call(data, source)
    if isinstance(data, tuple):
        if len(data) != 2:
            todo = "Give several inputs as a dict of arrays by name"
            raise InputError("cannot read the data", expected="(arrays, labels)", got=f"{len(data)} things", todo=todo)
        data, labels = data[0], data[1] if labels is None else labels
    given = _open_labels(labels)
    if isinstance(data, Mapping) or feeds.is_array(data):
        arrays = data if isinstance(data, Mapping) else {"": data}
        arrays = {name: feeds.to_array(value, f"{source} {name}".strip()) for name, value in arrays.items()}
        return _from_arrays(arrays, specs, source, given, limit, signature_name)
    if not isinstance(data, Iterable):
        raise InputError(
            "cannot read the data", where=source, expected="arrays or an iterable", got=type(data).__name__
        )
    return _from_stream(streams.Stream(data, start, source), specs, source, given, limit)


def seeded(
    signature: Signature,
    count: int,
    ranges: Mapping[str, tuple[float, float]] | None = None,
    seed: int = 0,
) -> Samples:
    """Uniform samples, for when there is no data; sample i depends on `seed` and i alone.

    Args:
      signature: The model's inputs; dynamic dimensions become 1.
      count: Number of samples.
      ranges: (lo, hi) by input name, both included for integers. Otherwise floats lie in [-1, 1], int32 and int64 in
        {0, 1}, smaller integers anywhere in their type, bools are either.
      seed: Of the generator.

    Raises:
      InputError: A range names no input, or an input has a dtype without numbers.

    >>> spec = TensorSpec("x", (-1, 2), "float32")
    >>> [sample["x"].shape for sample in seeded([spec], 2)]
    [(1, 2), (1, 2)]
    """
    specs = feeds.by_name(signature)
    given = ranges or {}
    unknown = [name for name in given if name not in specs]
    if unknown:
        raise feeds.wrong_name("ranges", unknown[0], list(specs))
    if count < 1:
        raise InputError("bad count", expected="1 sample or more", got=str(count))

    def draw(random: np.random.Generator, name: str, spec: TensorSpec) -> np.ndarray:
        shape, dtype = [max(dim, 1) for dim in spec.shape], feeds.numpy_dtype(spec)
        if dtype.kind in "iu":
            info = np.iinfo(dtype)
            low, high = given.get(name, (0, 1) if dtype.itemsize >= 4 else (info.min, info.max))
            return random.integers(max(int(low), info.min), min(int(high), info.max), shape, np.int64, True).astype(
                dtype
            )
        if dtype.kind == "b":
            return random.integers(0, 2, shape).astype(dtype)
        if dtype.kind != "f":
            raise InputError("cannot make samples", where=f"input {name}", got=spec.dtype, todo="Give data")
        low, high = given.get(name, (-1, 1))
        return random.uniform(low, high, shape).astype(dtype)

    def read() -> Iterator[feeds.Row]:
        for index in range(count):
            random = np.random.default_rng([seed, index])
            yield {name: draw(random, name, spec) for name, spec in specs.items()}, None

    next(read())
    return Samples(f"seeded samples (seed {seed})", read, count=count)


def _from_arrays(
    arrays: Mapping[str, np.ndarray],
    specs: dict[str, TensorSpec],
    source: str,
    labels: np.ndarray | None,
    limit: int | None,
    signature_name: str | None,
) -> Samples:
    arrays, own = feeds.pick(arrays, list(specs), source, signature_name)
    layouts = {name: feeds.layout(arrays[name], spec, source) for name, spec in specs.items()}
    counts = {name: layout.count for name, layout in layouts.items()}
    count = min(counts.values())
    if max(counts.values()) != count:
        got = ", ".join(f"{name}: {found}" for name, found in counts.items())
        raise InputError(
            "inputs differ in number", where=source, expected="as many samples of each", got=got, todo="Cut the longer"
        )
    notes = tuple(note for name, layout in layouts.items() for note in layout.notes(name))
    main = layouts[next((name for name, spec in specs.items() if spec.shape), next(iter(specs)))]
    labels = labels if labels is not None else own
    return _of_rows(
        lambda index: {name: layouts[name].sample(arrays[name], index, source) for name in specs},
        count,
        main.total,
        main.rows,
        labels,
        source,
        notes,
        limit,
    )


def _from_stream(
    stream: streams.Stream, specs: dict[str, TensorSpec], source: str, labels: np.ndarray | None, limit: int | None
) -> Samples:
    def read() -> Iterator[feeds.Row]:
        for number, item in enumerate(stream):
            yield from feeds.split(item, specs, f"{source}, item {number}")

    for _ in feeds.split(
        stream.peek(), specs, f"{source}, item 0"
    ):  # what is wrong with all is said before work begins
        pass
    reader = (
        streams.Spool(itertools.islice(read(), limit)) if stream.one_shot else lambda: itertools.islice(read(), limit)
    )
    return Samples(source, reader, labels=labels, limit=limit)


def _from_folder(
    folder: Path,
    specs: dict[str, TensorSpec],
    labels: np.ndarray | None,
    image_range: str | tuple[float, float] | None,
    limit: int | None,
) -> Samples:
    if len(specs) != 1:
        raise InputError(
            "a folder of images does not fit",
            where=str(folder),
            expected="a model with one input",
            got=f"{len(specs)} ({', '.join(specs)})",
            todo="Give the data as .npz or module:function",
        )
    [(name, spec)] = specs.items()
    reader = ImageReader(name, spec.shape, spec.dtype, image_range)
    paths, own = find_images(folder)
    count, tail = divmod(len(paths), spec.batch)
    notes = (feeds.tail_note(name, tail, len(paths), spec.batch),) if tail else ()

    def sample(index: int) -> Sample:
        group = paths[index * spec.batch : (index + 1) * spec.batch]
        return {name: np.stack([reader.read(path) for path in group])}

    labels = labels if labels is not None else own
    return _of_rows(sample, count, len(paths), spec.batch, labels, str(folder), notes, limit)


def _of_rows(
    sample: Callable[[int], Sample],
    count: int,
    total: int,
    rows: int,
    labels: np.ndarray | None,
    source: str,
    notes: tuple[str, ...],
    limit: int | None,
) -> Samples:
    """Samples by index: `total` rows in the source, `rows` in each sample."""
    if not count:
        got = f"{total} rows for a batch of {rows}" if total else None
        raise InputError("the data has no samples", where=source, got=got, todo="Give at least one")
    if labels is not None and len(labels) != total:
        raise _labels_differ(source, total, len(labels))
    count = count if limit is None else min(count, limit)
    labels = None if labels is None else labels[: count * rows]
    return Samples(
        source, lambda: ((sample(index), None) for index in range(count)), count=count, labels=labels, notes=notes
    )


def _open_labels(labels: Any) -> np.ndarray | None:
    if labels is None:
        return None
    if isinstance(labels, (str, os.PathLike)):
        if Path(labels).suffix != ".npy":
            raise InputError("cannot read the labels", where=str(labels), expected="a .npy file")
        labels = read_npy(Path(labels))
    array = feeds.to_array(labels, "labels")
    if not array.ndim:
        raise InputError("bad labels", expected="one per sample", got="a single value")
    return array


def _stream_labels(
    given: np.ndarray | None, own: list[np.ndarray], count: int, rows: int, cut: bool, source: str
) -> np.ndarray | None:
    """Labels after a first whole pass: those given if any, else the stream's own."""
    if given is not None:
        if len(given) not in (count, rows) and not (cut and len(given) > rows):
            raise _labels_differ(source, rows, len(given))
        return given[:rows]
    if not own:
        return None
    if len(own) != count:
        raise _labels_differ(source, count, len(own))
    try:
        return np.concatenate(own)
    except ValueError as error:
        raise InputError(
            "labels differ in shape", where=source, got=str(error), todo="Give all the same shape"
        ) from error


def _labels_differ(source: str, expected: int, got: int) -> InputError:
    return InputError(
        "labels do not match", where=source, expected=f"{expected} labels", got=str(got), todo="Give one per sample"
    )


def _path(data: Any) -> Path | None:
    """The file or folder that `data` names, None where it names a function or is data itself."""
    if not isinstance(data, (str, os.PathLike)):
        return None
    path = Path(data)
    if not path.exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", str(data)):
        return None
    if not path.exists():
        near = difflib.get_close_matches(path.name, os.listdir(path.parent) if path.parent.is_dir() else [], 1)
        raise InputError(
            "no such data",
            where=str(path),
            expected="a .npz or .npy file, a folder of images or module:function",
            todo=f"Did you mean {near[0]}?" if near else "Check the path",
        )
    if not path.is_dir() and path.suffix not in (".npz", ".npy"):
        raise InputError(
            "cannot read the data",
            where=str(path),
            expected="a .npz or .npy file, a folder of images or module:function",
            got=f"a {path.suffix or 'plain'} file",
        )
    return path


def _describe(data: Any) -> str:
    return (
        str(data) if isinstance(data, (str, os.PathLike)) else getattr(data, "__name__", f"the {type(data).__name__}")
    )
