"""One row per storage form: how codes become bytes and back. Kernels and files must agree with these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from paring.graph import Quantization


@dataclass(frozen=True)
class Form:
    """A storage form.

    Attributes:
      bits: Bits per element.
      low: Smallest code that is written.
      high: Largest code.
      dtype: The type name in files.
      pack: Codes of any shape -> flat uint8 bytes.
      unpack: Bytes and element count -> flat codes.
    """

    bits: int
    low: int
    high: int
    dtype: str
    pack: Callable[[np.ndarray], np.ndarray]
    unpack: Callable[[np.ndarray, int], np.ndarray]


def pack_int4(codes: np.ndarray) -> np.ndarray:
    """int8 codes in [-8, 7] -> uint8 [ceil(n / 2)], the low nibble first.

    >>> pack_int4(np.array([1, -1, 7], np.int8)).tolist()
    [241, 7]
    """
    flat = codes.reshape(-1).view(np.uint8) & 15
    if flat.size % 2:
        flat = np.append(flat, np.uint8(0))
    return np.asarray(flat[0::2] | (flat[1::2] << 4), np.uint8)


def unpack_int4(raw: np.ndarray, elements: int) -> np.ndarray:
    """The inverse of `pack_int4`: uint8 bytes -> int8 [elements].

    >>> unpack_int4(np.array([241, 7], np.uint8), 3).tolist()
    [1, -1, 7]
    """
    codes = np.empty(raw.size * 2, np.int8)
    signed = np.asarray(raw).view(np.int8)
    codes[0::2] = (signed << 4) >> 4
    codes[1::2] = signed >> 4
    return codes[:elements]


def _plain(dtype: str) -> tuple[Callable[[np.ndarray], np.ndarray], Callable[[np.ndarray, int], np.ndarray]]:
    def pack(codes: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(codes, dtype).reshape(-1).view(np.uint8)

    def unpack(raw: np.ndarray, elements: int) -> np.ndarray:
        return raw.view(dtype)[:elements]

    return pack, unpack


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "int8": Form(8, -127, 127, "int8", *_plain("i1")),
        "int16": Form(16, -32767, 32767, "int16", *_plain("<i2")),
        "int32": Form(32, -(2**31), 2**31 - 1, "int32", *_plain("<i4")),
        "int64": Form(64, -(2**63), 2**63 - 1, "int64", *_plain("<i8")),
        "int4": Form(4, -7, 7, "int4", pack_int4, unpack_int4),
        "float16": Form(16, 0, 0, "float16", *_plain("<f2")),
        "bfloat16": Form(16, 0, 0, "bfloat16", *_plain("<u2")),
    }
)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16, the upper half of the bits, rounded half to even; what is not a number stays none.

    >>> to_bfloat16(np.array([1.0, 1.00390625, 1.01171875], np.float32)).tolist()
    [16256, 16256, 16258]
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def up_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The next bfloat16 values from zero on, as float32: at most 1/128 more. For finite values far from the largest.

    >>> up_to_bfloat16(np.array([1.0, 1.001, 0.0], np.float32)).tolist()
    [1.0, 1.0078125, 0.0]
    """
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)


def from_bfloat16(codes: np.ndarray) -> np.ndarray:
    """uint16 bits -> the float32 that they stand for.

    >>> from_bfloat16(np.array([16256], np.uint16)).tolist()
    [1.0]
    """
    return (codes.astype(np.uint32) << 16).view(np.float32)


def decode(codes: np.ndarray, grid: Quantization) -> np.ndarray:
    """(codes - zero point) * scale in float32: per tensor, per channel, and per block of the last dimension.

    >>> decode(np.array([[2, -2]], np.int8), Quantization(np.array([0.5], np.float32), np.array([0]), "int8")).tolist()
    [[1.0, -1.0]]
    """
    scale, zero = grid.scale, grid.zero_point
    if grid.block:
        scale = np.repeat(scale.reshape(codes.shape[0], -1), grid.block, axis=1).reshape(codes.shape)
        return codes.astype(np.float32) * scale
    if grid.axis is not None:
        along = [1] * codes.ndim
        along[grid.axis] = -1
        scale, zero = scale.reshape(along), zero.reshape(along)
    return np.asarray((codes.astype(np.float32) - zero.astype(np.float32)) * scale, np.float32)
