"""The native libraries: where they are, and the C API (`native/core/paring.h`) as ctypes sees it. Importing this loads none.

They are built when paring is installed. Where no C++ compiler was found then, all else works, and what needs a library
says how to get it.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

from paring.errors import ParingError

_INSTALLED = Path(__file__).parents[1] / "native"

F32, S8, QD8 = 0, 1, 2
"""Types of layers: all float32; all int8; float activations that are quantized when they arrive, with int8 weights."""


class NativeError(ParingError):
    """The native library is missing, or does not do what was asked."""


class Conv(ctypes.Structure):
    """`paring_conv`: a convolution, or a dense layer as a 1x1 convolution; sizes in elements, see `paring.h`."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("type", "outputs", "kernel_h", "kernel_w", "inputs")),
        *((name, ctypes.c_int32) for name in ("stride_h", "stride_w", "dilation_h", "dilation_w", "same")),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("weight_scale", ctypes.c_void_p),
        ("weight_scales", ctypes.c_int32),
        ("x_scale", ctypes.c_float),
        ("y_scale", ctypes.c_float),
        ("x_zero", ctypes.c_int32),
        ("y_zero", ctypes.c_int32),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
    )


class LayerInfo(ctypes.Structure):
    """`paring_layer_info`: what packing made of a layer."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("block_outputs", ctypes.c_int32),
        ("block_inputs", ctypes.c_int32),
        ("nonzeros", ctypes.c_int64),
        ("stored", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
    )


class KernelInfo(ctypes.Structure):
    """`paring_kernel_info`: one row of the kernel table."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("isa", ctypes.c_char_p),
        ("type", ctypes.c_int32),
        ("block_outputs", ctypes.c_int32),
        ("block_inputs", ctypes.c_int32),
    )


_CONV, _LAYER, _PLAN, _INT = ctypes.POINTER(Conv), ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32
_SIZES = (_INT, _INT, _INT, _INT)
_SIGNATURES = {
    "paring_pack": (_LAYER, _CONV, ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_size_t),
    "paring_layer_delete": (None, _LAYER),
    "paring_layer_describe": (LayerInfo, _LAYER),
    "paring_plan_new": (_PLAN, _LAYER, *_SIZES),
    "paring_plan_delete": (None, _PLAN),
    "paring_run": (None, _PLAN, ctypes.c_void_p, ctypes.c_void_p),
    "paring_output_shape": (None, _CONV, _INT, _INT, ctypes.POINTER(_INT), ctypes.POINTER(_INT)),
    "paring_kernel": (ctypes.c_int, ctypes.c_int, ctypes.POINTER(KernelInfo)),
    "paring_isa": (ctypes.c_char_p,),
    "paring_set_isa": (ctypes.c_int, ctypes.c_char_p),
    "paring_estimate": (ctypes.c_double, _LAYER, *_SIZES),
    "paring_estimate_dense": (ctypes.c_double, _CONV, *_SIZES),
}


def delegate_path() -> str:
    """The path of the LiteRT delegate, for `load_delegate` of `ai_edge_litert` or of `tensorflow`.

    It is the library that installing paring has built. PARING_LIBRARY names another one.

    Raises:
      NativeError: paring was installed without its library, or PARING_LIBRARY names no file.

    >>> from pathlib import Path
    >>> Path(delegate_path()).suffix
    '.so'
    """
    return _find("libparing.so", "PARING_LIBRARY")


def operators_path() -> str:
    """The path of the library with the TensorFlow operators, which `import paring.tensorflow` loads.

    It is the one that installing paring has built. PARING_TENSORFLOW_LIBRARY names another one.

    Raises:
      NativeError: paring was installed without it, or PARING_TENSORFLOW_LIBRARY names no file.

    >>> from pathlib import Path
    >>> Path(operators_path()).suffix
    '.so'
    """
    return _find("libparing_tensorflow.so", "PARING_TENSORFLOW_LIBRARY")


def _find(file: str, variable: str) -> str:
    named = os.environ.get(variable)
    path = Path(named) if named else _INSTALLED / file
    if path.is_file():
        return str(path)
    if named:
        raise NativeError(
            "cannot find the native library", where=variable, expected="a file", got=named, todo=f"Unset {variable}"
        )
    raise NativeError(
        "cannot find the native library",
        where=str(path),
        expected="a library built from C++ when paring was installed",
        got="none: no C++17 compiler worked then",
        todo="Install one (on Debian and Ubuntu: sudo apt install g++) or name yours with CXX, then install paring again, "
        "from its source with `pip install --force-reinstall --no-deps --no-cache-dir .`; with -v pip shows what went wrong",
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The C API with its signatures declared, loaded once.

    Raises:
      NativeError: There is no library, it does not load, or it is of another version.

    >>> library().paring_isa().decode() in ("portable", "avx2", "avx2vnni", "avx512", "avx512vnni")
    True
    """
    path = delegate_path()
    again = "Install paring again, or build it again with `make native`"
    try:
        loaded = ctypes.CDLL(path)
    except OSError as error:
        raise NativeError("cannot load the native library", where=path, got=str(error), todo=again) from error
    for name, (result, *arguments) in _SIGNATURES.items():
        try:
            function = getattr(loaded, name)
        except AttributeError as error:
            raise NativeError(
                "cannot use the native library", where=path, expected=f"the function {name}", got="none", todo=again
            ) from error
        function.restype, function.argtypes = result, arguments
    return loaded


def isa() -> str:
    """The instruction set in force: the best that machine and build have, or the one that PARING_ISA names.

    Raises:
      NativeError: There is no library.

    >>> isa() in ("portable", "avx2", "avx2vnni", "avx512", "avx512vnni")
    True
    """
    name: bytes = library().paring_isa()
    return name.decode()


def available_isa() -> str | None:
    """The instruction set in force, None without a library: for those who only want to say so.

    >>> available_isa() == isa()
    True
    """
    try:
        return isa()
    except NativeError:
        return None


def kernels() -> Iterator[KernelInfo]:
    """The rows of the kernel table that this machine can run under the instruction set in force.

    Raises:
      NativeError: There is no library.

    >>> {row.type for row in kernels()} <= {F32, S8, QD8}
    True
    """
    index, row = 0, KernelInfo()
    while library().paring_kernel(index, ctypes.byref(row)):
        yield row
        index, row = index + 1, KernelInfo()
