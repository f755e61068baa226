"""Messages between parent and child: a JSON head and raw arrays behind it. Nothing is unpickled on either side."""

from __future__ import annotations

import json
import struct
from typing import Any, BinaryIO

import numpy as np

_HEAD = struct.Struct("<I")


def send(pipe: BinaryIO, message: dict[str, Any], arrays: list[np.ndarray] | None = None) -> None:
    """Writes one message; arrays of any numeric or bool dtype, any shape."""
    arrays = [np.asarray(a, order="C") for a in arrays or []]  # ascontiguousarray would turn a scalar into a vector
    shapes = [[a.dtype.str, list(a.shape)] for a in arrays]
    head = json.dumps({**message, "arrays": shapes}).encode()
    pipe.write(_HEAD.pack(len(head)) + head)
    for array in arrays:
        pipe.write(array.tobytes())
    pipe.flush()


def receive(pipe: BinaryIO) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Reads one message; raises EOFError where the other side is gone."""
    (size,) = _HEAD.unpack(_exactly(pipe, _HEAD.size))
    message: dict[str, Any] = json.loads(_exactly(pipe, size))
    arrays = []
    for code, shape in message.pop("arrays"):
        dtype = np.dtype(code)
        if dtype.hasobject:
            raise EOFError("an object array has no place on this wire")
        count = int(np.prod(shape, dtype=np.int64))
        arrays.append(np.frombuffer(_exactly(pipe, count * dtype.itemsize), dtype).reshape(shape))
    return message, arrays


def _exactly(pipe: BinaryIO, size: int) -> bytes:
    chunks = []
    while size:
        chunk = pipe.read(size)
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)
