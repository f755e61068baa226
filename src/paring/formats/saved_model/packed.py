"""Packed weights for the native TensorFlow operators: int4 in blocks, and sparse; a vector of bytes, the weights of one layer.

Little endian throughout, as `native/tensorflow/packed.cc` reads it. A header of 64 bytes: `PARING\\0\\1`, int32 kind, kernel
height and width, inputs, outputs, block, int64 nonzeros, zeros. `K` below is kernel height * width * inputs, in that order.

- int4 blocks: bytes [ceil(K / 2)][outputs] with the even row in the low nibble, zeros up to a multiple of 64 from the start,
  float16 scales [ceil(K / block)][outputs].
- sparse: a bitmap [outputs][ceil(K / 8)], lowest bit first, 1 where there is a weight; zeros up to a multiple of 64; the
  weights, float32 or int8, in the order of the bitmap.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from paring.errors import InputError

INT4, SPARSE_FLOAT32, SPARSE_INT8 = 1, 2, 3
"""Kinds of blobs, as the header spells them."""

_MAGIC = b"PARING\0\1"
_HEADER = struct.Struct("<8s6iq24x")
_LINE = 64  # bytes: what follows a bitmap or codes begins at a multiple of it
_TYPES: dict[int, np.dtype] = {SPARSE_FLOAT32: np.dtype("<f4"), SPARSE_INT8: np.dtype("i1")}


@dataclass(frozen=True)
class Packed:
    """What a blob holds.

    Attributes:
      kind: INT4, SPARSE_FLOAT32 or SPARSE_INT8.
      kernel: Height and width of the kernel; (1, 1) for a matrix.
      inputs: Input channels.
      weights: INT4: codes, int8 [K, outputs]; else float32 or int8 [outputs, K].
      scales: INT4: float16 [ceil(K / block), outputs]; else None.
      block: INT4: rows that share a scale; else 0.
    """

    kind: int
    kernel: tuple[int, int]
    inputs: int
    weights: np.ndarray
    scales: np.ndarray | None = None
    block: int = 0


def pack_int4(codes: np.ndarray, scales: np.ndarray, block: int, kernel: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Codes of 4 bits in blocks along the inputs -> the blob, int8 [bytes].

    Args:
      codes: int8 [K, outputs], from -8 to 7.
      scales: float16 [ceil(K / block), outputs].
      block: Rows of `codes` that share a scale.
      kernel: Height and width of a convolution's kernel, by which K must divide.

    Raises:
      InputError: The arrays do not fit each other, or a code has more than 4 bits.

    >>> blob = pack_int4(np.array([[1], [-8], [7]], np.int8), np.array([[0.5], [2.0]], np.float16), block=2)
    >>> blob.size, unpack(blob).weights.ravel().tolist(), unpack(blob).scales.ravel().tolist()
    (132, [1, -8, 7], [0.5, 2.0])
    """
    _matrix(codes, "int8")
    rows, outputs = codes.shape
    inputs = _inputs(rows, kernel)
    expected = (-(-rows // block), outputs) if block >= 1 else ()
    if scales.dtype != np.float16 or scales.shape != expected:
        raise _wrong(f"float16 scales {list(expected)}", f"{scales.dtype} {list(scales.shape)}")
    if not -8 <= codes.min() <= codes.max() <= 7:
        raise _wrong("codes from -8 to 7", f"{codes.min()} to {codes.max()}")
    nibbles = codes.view(np.uint8) & 15
    low, high = nibbles[0::2], nibbles[1::2]
    pairs = low.copy()
    pairs[: len(high)] |= high << 4
    return _blob((INT4, *kernel, inputs, outputs, block, 0), pairs, np.ascontiguousarray(scales, "<f2"))


def pack_sparse(weights: np.ndarray, kernel: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Weights with zeros -> the blob, int8 [bytes]: a bit for each weight, and those that are not zero.

    Args:
      weights: float32 or int8 [outputs, K].
      kernel: Height and width of a convolution's kernel, by which K must divide.

    Raises:
      InputError: The weights are of another type, infinite, not a number or -128, which the kernels cannot take.

    >>> blob = pack_sparse(np.array([[0, 3, 0], [0, 0, -1]], np.int8))
    >>> blob.size, unpack(blob).weights.tolist()
    (130, [[0, 3, 0], [0, 0, -1]])
    """
    if weights.dtype not in (np.float32, np.int8):
        raise _wrong("float32 or int8 weights", str(weights.dtype))
    _matrix(weights, weights.dtype.name)
    outputs, columns = weights.shape
    inputs = _inputs(columns, kernel)
    kind = SPARSE_INT8 if weights.dtype == np.int8 else SPARSE_FLOAT32
    if kind == SPARSE_INT8 and weights.min() == -128:
        raise _wrong("int8 weights from -127 to 127", "-128")
    if kind == SPARSE_FLOAT32 and not np.isfinite(weights).all():
        raise _wrong("finite weights", "an infinity or not-a-number")
    mask = weights != 0
    values = np.ascontiguousarray(weights[mask], _TYPES[kind])
    return _blob((kind, *kernel, inputs, outputs, 0, values.size), np.packbits(mask, 1, "little"), values)


def unpack(blob: np.ndarray) -> Packed:
    """The inverse of `pack_int4` and `pack_sparse`; trusts nothing in the blob.

    Args:
      blob: int8 or uint8 [bytes].

    Raises:
      InputError: The blob is none, or does not fit its own header.

    >>> unpack(np.zeros(64, np.int8))
    Traceback (most recent call last):
    paring.errors.InputError: cannot read packed weights: expected a blob of paring's, got other bytes. ...
    """
    raw = np.ascontiguousarray(blob).reshape(-1).view(np.uint8)
    if raw.size < _HEADER.size or raw[: len(_MAGIC)].tobytes() != _MAGIC:
        raise _broken("a blob of paring's", "other bytes")
    _, kind, height, width, inputs, outputs, block, nonzeros = _HEADER.unpack(raw[: _HEADER.size].tobytes())
    if min(height, width, inputs, outputs) < 1 or kind not in (INT4, *_TYPES):
        raise _broken("a known kind and sizes of at least 1", f"kind {kind}, {[height, width, inputs, outputs]}")
    if (block < 1 or nonzeros) if kind == INT4 else (block or nonzeros < 0):
        raise _broken("the fields of its kind", f"kind {kind}, block {block}, {nonzeros} nonzeros")
    depth = height * width * inputs
    packed = (-(-depth // 2), outputs) if kind == INT4 else (outputs, -(-depth // 8))
    behind = _up(_HEADER.size + packed[0] * packed[1])
    size = behind + (2 * -(-depth // block) * outputs if kind == INT4 else nonzeros * _TYPES[kind].itemsize)
    if raw.size != size:
        raise _broken(f"{size} bytes", str(raw.size))
    first = raw[_HEADER.size : _HEADER.size + packed[0] * packed[1]].reshape(packed)
    if kind == INT4:
        codes = np.empty((2 * packed[0], outputs), np.int8)
        codes[0::2] = (first.view(np.int8) << 4) >> 4
        codes[1::2] = first.view(np.int8) >> 4
        scales = raw[behind:].view("<f2").reshape(-1, outputs).astype(np.float16)
        return Packed(kind, (height, width), inputs, codes[:depth], scales, block)
    bits = np.unpackbits(first, axis=1, bitorder="little")
    if bits[:, depth:].any() or int(bits.sum(dtype=np.int64)) != nonzeros:
        raise _broken(f"{nonzeros} weights in the bitmap", "another number")
    weights = np.zeros((outputs, depth), _TYPES[kind].newbyteorder("="))
    weights[bits[:, :depth].astype(bool)] = raw[behind:].view(_TYPES[kind])
    return Packed(kind, (height, width), inputs, weights)


def _blob(fields: tuple[int, ...], first: np.ndarray, second: np.ndarray) -> np.ndarray:
    behind = _up(_HEADER.size + first.nbytes)
    blob = np.zeros(behind + second.nbytes, np.int8)
    raw = blob.view(np.uint8)
    raw[: _HEADER.size] = np.frombuffer(_HEADER.pack(_MAGIC, *fields), np.uint8)
    raw[_HEADER.size : _HEADER.size + first.nbytes] = first.reshape(-1)
    raw[behind:] = second.reshape(-1).view(np.uint8)
    return blob


def _up(size: int) -> int:
    return -(-size // _LINE) * _LINE


def _matrix(array: np.ndarray, dtype: str) -> None:
    if array.dtype != dtype or array.ndim != 2 or not array.size:
        raise _wrong(f"a matrix of {dtype} with elements", f"{array.dtype} {list(array.shape)}")


def _inputs(depth: int, kernel: tuple[int, int]) -> int:
    taps = kernel[0] * kernel[1]
    if min(kernel) < 1 or depth % taps:
        raise _wrong(f"a multiple of the {kernel[0]} x {kernel[1]} kernel's taps", f"{depth} inputs in all")
    return depth // taps


def _wrong(expected: str, got: str) -> InputError:
    return InputError("cannot pack the weights", expected=expected, got=got)


def _broken(expected: str, got: str) -> InputError:
    todo = "The file is damaged, or of another version: write the model again"
    return InputError("cannot read packed weights", expected=expected, got=got, todo=todo)
