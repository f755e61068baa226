"""`.npy` and `.npz` files read as memory maps where the file allows it, and never unpickled."""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from paring.errors import InputError

_TODO = "Save it with np.save or np.savez from plain numeric arrays"


def read_npy(path: Path) -> np.ndarray:
    """Maps a `.npy` file, any shape and any numeric dtype, read-only.

    Raises:
      InputError: The file is missing, is no `.npy`, is cut short, or holds pickled objects.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "x.npy"
    >>> np.save(file, np.arange(3))
    >>> read_npy(file).tolist()
    [0, 1, 2]
    """
    try:
        with path.open("rb") as file:
            return _map(file, path, 0, path.stat().st_size, path.name)
    except OSError as error:
        raise InputError("cannot read the data", where=str(path), got=_why(error), todo="Check the path") from error


def read_npz(path: Path) -> Mapping[str, np.ndarray]:
    """Reads every array of a `.npz`: stored members are mapped, compressed ones are loaded.

    Raises:
      InputError: The file is missing, is no `.npz`, or a member is no plain array.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "x.npz"
    >>> np.savez(file, a=np.zeros((2, 3)), b=np.ones(2, np.int32))
    >>> {name: (array.shape, str(array.dtype)) for name, array in read_npz(file).items()}
    {'a': ((2, 3), 'float64'), 'b': ((2,), 'int32')}
    """
    arrays = {}
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                where = f"{path.name}, array {member.filename.removesuffix('.npy')}"
                if not member.filename.endswith(".npy"):
                    raise InputError("cannot read the data", where=where, expected="arrays only", todo=_TODO)
                if member.compress_type == zipfile.ZIP_STORED and not member.flag_bits & 1:
                    file.seek(member.header_offset + 26)
                    name_size, extra_size = struct.unpack("<HH", file.read(4))
                    start = member.header_offset + 30 + name_size + extra_size
                    array = _map(file, path, start, member.file_size, where)
                else:
                    array = _load(archive.open(member), member.file_size, where)
                arrays[member.filename.removesuffix(".npy")] = array
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, struct.error, zlib.error) as error:
        raise InputError(
            "cannot read the data", where=str(path), expected="a .npz archive", got=_why(error), todo=_TODO
        ) from error
    except OSError as error:
        raise InputError("cannot read the data", where=str(path), got=_why(error), todo="Check the path") from error
    return arrays


def _header(file: IO[bytes], size: int, where: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Reads a npy header and checks what it claims against the bytes there are."""
    try:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        start = file.tell()
        shape, fortran, dtype = read(file)
        data = size - 8 - (file.tell() - start)
    except (ValueError, KeyError, EOFError, MemoryError, RecursionError) as error:
        raise InputError(
            "cannot read the data", where=where, expected=".npy data", got=_why(error), todo=_TODO
        ) from error
    if dtype.hasobject:
        raise InputError(
            "cannot read the data",
            where=where,
            expected="numbers",
            got="pickled Python objects, which are never loaded",
            todo="Rows of different length? Pad them to one shape, or give a module:function that yields them",
        )
    if any(dim < 0 for dim in shape) or math.prod(shape) * dtype.itemsize != data:
        got = f"{data} bytes for {dtype}{list(shape)}"
        raise InputError("cannot read the data", where=where, expected="a whole file", got=got, todo="Write it again")
    return shape, fortran, dtype


def _map(file: IO[bytes], path: Path, start: int, size: int, where: str) -> np.ndarray:
    file.seek(start)
    shape, fortran, dtype = _header(file, size, where)
    order = "F" if fortran else "C"
    if not math.prod(shape) or not dtype.itemsize:
        return np.empty(shape, dtype)
    try:
        return np.memmap(path, dtype, "r", file.tell(), shape, order)  # type: ignore[call-overload]
    except ValueError as error:
        raise InputError(
            "cannot read the data", where=where, expected="a whole file", got=_why(error), todo="Write it again"
        ) from error


def _load(member: IO[bytes], size: int, where: str) -> np.ndarray:
    with member:
        shape, fortran, dtype = _header(member, size, where)
        try:
            data = member.read(size)
        except MemoryError as error:
            raise InputError(
                "cannot read the data", where=where, got="no memory for it", todo="Store it with np.savez, uncompressed"
            ) from error
    try:
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except ValueError as error:
        raise InputError(
            "cannot read the data", where=where, expected="a whole file", got=_why(error), todo="Write it again"
        ) from error


def _why(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).splitlines()[0] if str(error) else type(error).__name__
