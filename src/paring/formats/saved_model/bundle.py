"""The variables of a SavedModel: read one at a time, written in shards, so that memory holds one layer."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from paring.errors import InputError

OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"
"""The key of the object graph, which says what Python object each variable is."""
SHARD = 128 << 20  # bytes of one shard, unless a single tensor is larger


class Bundle:
    """The checkpoint `variables/variables` of a SavedModel.

    Attributes:
      shapes: By key.
      dtypes: By key, TensorFlow's names.
    """

    def __init__(self, prefix: Path, where: str) -> None:
        """Opens the index and looks whether the shards are as long as it says.

        Raises:
          InputError: The files are missing or broken.
        """
        self.prefix, self.where = prefix, where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._reader: Any = None
        if not prefix.with_name(f"{prefix.name}.index").is_file():
            if prefix.parent.is_dir() and any(prefix.parent.iterdir()):
                raise self._broken(f"no {prefix.name}.index")
            return  # a model without variables
        from tensorflow import train

        try:
            self._reader = train.load_checkpoint(str(prefix))
            shapes, dtypes = self._reader.get_variable_to_shape_map(), self._reader.get_variable_to_dtype_map()
        except Exception as error:
            raise self._broken(str(error)) from error
        self.shapes = {key: tuple(int(d) for d in shape) for key, shape in shapes.items()}
        self.dtypes = {key: dtype.name for key, dtype in dtypes.items()}
        sizes = {k: int(np.prod(s, dtype=np.int64)) * train_size(self.dtypes[k]) for k, s in self.shapes.items()}
        held = sum(file.stat().st_size for file in prefix.parent.glob(f"{prefix.name}.data-*"))
        if held < sum(sizes.values()):
            raise self._broken(f"{held} bytes", f"at least {sum(sizes.values())} bytes of variables")

    def __contains__(self, key: object) -> bool:
        return key in self.shapes

    def read(self, key: str) -> Any:
        """The values of one key: an array, or bytes for a single text.

        Raises:
          InputError: The file is broken.
        """
        try:
            return self._reader.get_tensor(key)
        except Exception as error:
            raise self._broken(f"{key}: {error}") from error

    def _broken(self, got: str, expected: str = "a whole checkpoint in variables/") -> InputError:
        return InputError(
            "cannot read the variables", where=self.where, expected=expected, got=got.splitlines()[0][:300],
            todo="Is the copy complete? Export the model again",
        )  # fmt: skip


def train_size(dtype: str) -> int:
    """Bytes of an element; text counts as none.

    >>> train_size("bfloat16"), train_size("string")
    (2, 0)
    """
    sizes = {"bfloat16": 2, "string": 0, "variant": 0, "resource": 0}
    return sizes[dtype] if dtype in sizes else np.dtype(dtype).itemsize if dtype in np.sctypeDict else 1


def write(
    prefix: Path, keys: Mapping[str, Callable[[], Any]], sizes: Mapping[str, int], shard: int | None = None
) -> None:
    """Writes a checkpoint, in one file where it is small, else in shards.

    Args:
      prefix: Path without endings.
      keys: For each key what gives its values, called once, when its shard is written.
      sizes: Bytes by key, as far as they are known.
      shard: Bytes of a shard.
    """
    import tensorflow as tf

    groups = list(_groups(keys, sizes, SHARD if shard is None else shard))
    parts = [prefix] if len(groups) == 1 else [prefix.with_name(f".part{n}") / prefix.name for n in range(len(groups))]
    with tf.device("CPU:0"):
        for part, names in zip(parts, groups, strict=True):
            part.parent.mkdir(exist_ok=True)
            tensors = [tf.constant(keys[name]()) for name in names]
            tf.raw_ops.SaveV2(prefix=str(part), tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
            del tensors
        if len(groups) > 1:
            prefixes = [str(part) for part in parts]
            tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=prefixes, destination_prefix=str(prefix))
            for part in parts:
                shutil.rmtree(part.parent, ignore_errors=True)


def _groups(keys: Mapping[str, Any], sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    group: list[str] = []
    held = 0
    for name in sorted(keys):
        size = sizes.get(name, 0)
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    if group:
        yield group
