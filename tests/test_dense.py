"""Products with dense int8 and int4 weights (`native/core/dense.h`) against NumPy, under every instruction set of this machine.

Expected results are the plain definition in float64; what is allowed is the error of a sum in float32.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_native import ISAS, isa_set

EVERY_ISA = pytest.mark.parametrize("isa", ISAS)


class Product(ctypes.Structure):
    """`paring_product`."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "k", "n")),
        ("x", ctypes.c_void_p),
        ("x_row", ctypes.c_int64),
        ("x_bf16", ctypes.c_int32),
        ("round", ctypes.c_int32),
        ("w", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("transposed", ctypes.c_int32),
        ("block_scale", ctypes.c_void_p),
        ("block", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("y_row", ctypes.c_int64),
        ("y_bf16", ctypes.c_int32),
    )


class ProductConv(ctypes.Structure):
    """`paring_product_conv`."""

    _fields_ = (
        ("p", Product),
        *((name, ctypes.c_int32) for name in ("n", "h", "w", "inputs", "kernel_h", "kernel_w", "stride_h", "stride_w")),
        *((name, ctypes.c_int32) for name in ("dilation_h", "dilation_w", "pad_top", "pad_left", "out_h", "out_w")),
    )


@dataclass(frozen=True)
class Case:
    """A product, drawn from `seed`.

    Attributes:
      block: Inputs that share a scale, of 4-bit weights; 0 for none.
      apart: Elements between rows of x and of the result beyond their length.
      offset: Bytes by which weights, and elements by which x and result begin off a cache line.
    """

    m: int = 1
    k: int = 64
    n: int = 64
    bits: int = 8
    block: int = 0
    transposed: bool = False
    round: bool = False
    x_bf16: bool = False
    y_bf16: bool = False
    scaled: bool = True
    apart: int = 0
    offset: int = 0
    threads: int = 1
    seed: int = 0


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, to nearest with ties to even."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), (bits >> 16 | 0x40).astype(np.uint16), rounded)


def widened(bits: np.ndarray) -> np.ndarray:
    """The floats that bits of bfloat16 stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def off_line(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy that begins `offset` elements after a cache line, with nothing of its own behind it."""
    room = np.zeros(array.size + 64 + offset, array.dtype)
    skip = -room.ctypes.data % 64 // array.itemsize + offset
    there = room[skip : skip + array.size].reshape(array.shape)
    there[...] = array
    return there


def draw_weights(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(what the library reads, the same as float64 [k, n], scales of blocks)."""
    shape = (case.k, case.n)
    if case.bits == 8:
        codes = rng.integers(-128, 128, shape, dtype=np.int8)
        stored = np.ascontiguousarray(codes.T) if case.transposed else codes
        return off_line(stored, case.offset), codes.astype(np.float64), None
    codes = rng.integers(-8, 8, shape, dtype=np.int8)
    # Nobody promises what is in the nibble behind the last row.
    rows = np.concatenate([codes, rng.integers(-8, 8, (case.k % 2, case.n), dtype=np.int8)]).view(np.uint8)
    stored = off_line((rows[0::2] & 15) | (rows[1::2] << 4), case.offset)
    if not case.block:
        return stored, codes.astype(np.float64), None
    blocks = rng.uniform(0.5, 1.5, (-(-case.k // case.block), case.n)).astype(np.float16)
    whole = blocks.astype(np.float64).repeat(case.block, 0)[: case.k]
    return stored, codes * whole, off_line(blocks, case.offset)


def rows_of(x: np.ndarray, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(what the library reads of x, its value as the product sees it, float64)."""
    value = widened(bfloat16(x)) if case.round or case.x_bf16 else x
    return off_line(bfloat16(x) if case.x_bf16 else x, case.offset), value.astype(np.float64)


def compare(found: np.ndarray, x: np.ndarray, w: np.ndarray, scale: np.ndarray, case: Case) -> None:
    """Raises where a result is further from the definition than float32's sums may be."""
    with np.errstate(all="ignore"):
        wanted = (x @ w) * scale
        norms = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(w, axis=0) * np.abs(scale)
        allowed = 1e-6 * np.sqrt(max(case.k, 1)) * norms + (np.abs(wanted) * 2.0**-8 if case.y_bf16 else 0)
        wrong = ~(np.abs(found - wanted) <= allowed)
    assert not wrong.any(), f"{case}: {np.argwhere(wrong)[:5]}: {found[wrong][:5]}, not {wanted[wrong][:5]}"


def run_product(case: Case, x: np.ndarray | None = None, threads: int | None = None) -> np.ndarray:
    """Runs and compares; the result as stored."""
    from paring.runtime import native as api

    rng = np.random.default_rng(case.seed)
    drawn = rng.standard_normal((case.m, case.k + case.apart)).astype(np.float32)
    if x is not None:
        drawn[:, : case.k] = x
    stored, value = rows_of(drawn, case)
    weights, real, blocks = draw_weights(case, rng)
    scale = rng.uniform(-1.5, 1.5, case.n).astype(np.float32) if case.scaled else np.ones(case.n, np.float32)
    room = np.full(case.m * (case.n + case.apart) + 128, 77, np.uint16 if case.y_bf16 else np.float32)
    y = room[64:-64].reshape(case.m, case.n + case.apart)
    described = Product(
        case.m, case.k, case.n, stored.ctypes.data, case.k + case.apart, case.x_bf16, case.round,
        weights.ctypes.data, case.bits, case.transposed, None if blocks is None else blocks.ctypes.data, case.block,
        scale.ctypes.data if case.scaled else None, y.ctypes.data, case.n + case.apart, case.y_bf16,
    )  # fmt: skip
    assert not api.library().paring_product_run(ctypes.byref(described), case.threads if threads is None else threads)
    assert (room[:64] == 77).all() and (room[-64:] == 77).all() and (y[:, case.n :] == 77).all()
    y = y[:, : case.n]
    if np.isfinite(value[:, : case.k]).all():
        compare(widened(y) if case.y_bf16 else y, value[:, : case.k], real, scale, case)
    else:
        with np.errstate(all="ignore"):
            wanted = sum((value[:, j : j + 1] * real[j] for j in range(case.k)), np.zeros((case.m, case.n))) * scale
        shown = widened(y) if case.y_bf16 else y
        odd = ~np.isfinite(wanted)
        np.testing.assert_array_equal(shown[odd], wanted[odd].astype(np.float32), err_msg=str(case))
        assert np.isfinite(shown[~odd]).all()
    return y.copy()


SIZES = st.one_of(st.integers(0, 40), st.sampled_from((63, 64, 65, 96, 127, 128, 129, 255, 256, 257, 300, 513, 600)))
CASES = st.builds(
    Case,
    m=st.one_of(st.just(1), st.integers(0, 30), st.sampled_from((95, 96, 97, 130))),
    k=SIZES,
    n=SIZES,
    bits=st.sampled_from((8, 4)),
    block=st.sampled_from((0, 1, 3, 7, 16, 18, 32, 64, 128, 1000)),
    transposed=st.booleans(),
    round=st.booleans(),
    x_bf16=st.booleans(),
    y_bf16=st.booleans(),
    scaled=st.booleans(),
    apart=st.sampled_from((0, 1, 5)),
    offset=st.integers(0, 5),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
).map(lambda c: replace(c, block=0) if c.bits == 8 else replace(c, transposed=False))
ONE = Case(m=1, k=300, n=600, threads=2)
MANY = Case(m=70, k=300, n=600, threads=2, round=True)


def needs(isa: str, there: bool) -> None:
    if not there:
        pytest.skip(f"this processor has no {isa}")


@EVERY_ISA
@given(case=CASES)
@settings(max_examples=120, deadline=None)
@example(case=ONE)
@example(case=replace(ONE, transposed=True, k=333, n=4101))
@example(case=replace(ONE, bits=4, block=32, n=4101))
@example(case=replace(ONE, bits=4, block=7, n=33))
@example(case=MANY)
@example(case=replace(MANY, transposed=True, k=333, n=333))
@example(case=replace(MANY, bits=4, block=32))
@example(case=replace(MANY, bits=4, block=18, k=301))
@example(case=replace(MANY, round=False, bits=4, block=7))
def test_products_agree_with_numpy(isa: str, native, case: Case):
    with isa_set(isa) as there:
        needs(isa, there)
        run_product(case)


@EVERY_ISA
@pytest.mark.parametrize(
    "case", [ONE, replace(ONE, bits=4, block=32), MANY, replace(MANY, bits=4, block=32), replace(MANY, m=3, n=2100)]
)
def test_the_number_of_threads_changes_nothing(isa: str, native, case: Case):
    with isa_set(isa) as there:
        needs(isa, there)
        one, *others = (run_product(case, threads=threads) for threads in (1, 2, 3, 5, 16))
    for other in others:
        np.testing.assert_array_equal(one, other)


@EVERY_ISA
@pytest.mark.parametrize("m", [1, 3])
def test_rounding_is_to_nearest_even(isa: str, native, m: int):
    rng = np.random.default_rng(3)
    upper = np.concatenate(
        [rng.integers(0x0080, 0x7F7F, 300), rng.integers(0x8080, 0xFF7F, 300), [0x7F80, 0xFF80, 0, 0x8000]]
    )
    lower = rng.choice([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], upper.size) * ~np.isin(upper & 0x7FFF, (0, 0x7F80))
    x = np.resize((upper << 16 | lower).astype(np.uint32).view(np.float32), (m, upper.size))
    # x times a unit matrix is x as it was rounded, and its infinities make all else NaN: those have products of their own.
    finite = np.where(np.isfinite(x), x, 0)
    case = Case(m=m, k=x.shape[1], n=x.shape[1], round=True)
    with isa_set(isa) as there:
        needs(isa, there)
        found = unit_product(case, finite)
        one = np.concatenate([unit_product(replace(case, k=1, n=1), x[:, j : j + 1]) for j in range(600, 604)], 1)
    np.testing.assert_array_equal(found, widened(bfloat16(finite)))
    np.testing.assert_array_equal(one, widened(bfloat16(x[:, 600:604])))
    assert np.isinf(one[:, :2]).all()


def unit_product(case: Case, x: np.ndarray) -> np.ndarray:
    """x times a unit matrix of int8."""
    from paring.runtime import native as api

    x, weights, y = np.ascontiguousarray(x), np.eye(case.k, dtype=np.int8), np.zeros((case.m, case.n), np.float32)
    described = Product(
        case.m, case.k, case.n, x.ctypes.data, case.k, 0, case.round, weights.ctypes.data, 8, 0, None, 0, None,
        y.ctypes.data, case.n, 0,
    )  # fmt: skip
    assert not api.library().paring_product_run(ctypes.byref(described), 1)
    return y


@EVERY_ISA
@pytest.mark.parametrize("m", [1, 2, 40])
@pytest.mark.parametrize(
    "form", [{}, {"transposed": True}, {"bits": 4, "block": 32}, {"bits": 4, "block": 3}, {"y_bf16": True}]
)
@pytest.mark.parametrize("round", [False, True])
def test_what_is_not_finite_goes_through(isa: str, native, m: int, form: dict, round: bool):
    case = Case(m=m, k=75, n=50, round=round, **form)
    x = np.random.default_rng(5).standard_normal((m, case.k)).astype(np.float32)
    for i, (place, value) in enumerate(((0, np.nan), (74, np.inf), (33, -np.inf), (64, np.nan))):
        x[(i * 7) % m, place] = value
    with isa_set(isa) as there:
        needs(isa, there)
        run_product(case, x)
        for place, value in ((74, np.inf), (10, -np.inf), (74, np.nan)):
            x = np.ones_like(x)
            x[:, place] = value
            run_product(case, x)


def test_nan_stays_nan_where_rounding_would_make_it_infinite(native):
    x = np.array([[0x7F800001, 0xFFFFFFFF]], np.uint32).view(np.float32)
    assert np.isnan(unit_product(Case(m=1, k=1, n=1, round=True), x[:, :1])).all()
    assert np.isnan(unit_product(Case(m=1, k=1, n=1, round=True), x[:, 1:])).all()


# -- convolutions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """A convolution: sizes, and how much padding lies before the first and behind the last line and column."""

    n: int = 1
    h: int = 6
    w: int = 6
    inputs: int = 8
    outputs: int = 16
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    pads: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1))
    bits: int = 8
    block: int = 0
    round: bool = False
    x_bf16: bool = False
    y_bf16: bool = False
    threads: int = 1
    seed: int = 0


def run_conv(image: Image) -> None:
    from paring.runtime import native as api

    rng = np.random.default_rng(image.seed)
    reach = [(k - 1) * d + 1 for k, d in zip(image.kernel, image.dilation, strict=True)]
    given = (image.h, image.w)
    out = [max(0, (given[i] + sum(image.pads[i]) - reach[i]) // image.stride[i] + 1) for i in (0, 1)]
    depth = image.kernel[0] * image.kernel[1] * image.inputs
    case = Case(
        m=image.n * out[0] * out[1], k=depth, n=image.outputs, bits=image.bits, block=image.block, round=image.round,
        x_bf16=image.x_bf16, y_bf16=image.y_bf16, offset=1,
    )  # fmt: skip
    stored, value = rows_of(rng.standard_normal((image.n, *given, image.inputs)).astype(np.float32), case)
    weights, real, blocks = draw_weights(case, rng)
    scale = rng.uniform(-1.5, 1.5, image.outputs).astype(np.float32)
    y = np.full((case.m, case.n), 77, np.uint16 if case.y_bf16 else np.float32)
    product = Product(
        -1, -1, case.n, stored.ctypes.data, -1, case.x_bf16, case.round, weights.ctypes.data, case.bits, 0,
        None if blocks is None else blocks.ctypes.data, case.block, scale.ctypes.data, y.ctypes.data, case.n, case.y_bf16,
    )  # fmt: skip
    described = ProductConv(
        product, image.n, *given, image.inputs, *image.kernel, *image.stride, *image.dilation,
        image.pads[0][0], image.pads[1][0], *out,
    )  # fmt: skip
    assert not api.library().paring_product_conv_run(ctypes.byref(described), image.threads)
    padded = np.pad(value, ((0, 0), *image.pads, (0, 0)))
    patches = np.zeros((image.n, *out, depth))
    for i in range(image.kernel[0]):
        for j in range(image.kernel[1]):
            down, across = i * image.dilation[0], j * image.dilation[1]
            part = padded[:, down :: image.stride[0], across :: image.stride[1]][:, : out[0], : out[1]]
            if patches.size:
                patches[..., (i * image.kernel[1] + j) * image.inputs :][..., : image.inputs] = part
    compare(widened(y) if case.y_bf16 else y, patches.reshape(case.m, depth), real, scale, case)


PADS = st.tuples(st.integers(0, 3), st.integers(0, 3))
IMAGES = st.builds(
    Image,
    n=st.integers(0, 2),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    inputs=st.one_of(st.integers(1, 9), st.sampled_from((16, 33, 70))),
    outputs=st.one_of(st.integers(1, 70), st.just(130)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    pads=st.tuples(PADS, PADS),
    bits=st.sampled_from((8, 4)),
    block=st.sampled_from((0, 5, 16, 32)),
    round=st.booleans(),
    x_bf16=st.booleans(),
    y_bf16=st.booleans(),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**20),
).map(lambda image: image if image.bits == 4 else replace(image, block=0))


@EVERY_ISA
@given(image=IMAGES)
@settings(max_examples=80, deadline=None)
@example(image=Image(n=2, h=14, w=14, inputs=64, outputs=64, threads=2, round=True))
@example(image=Image(h=1, w=1, kernel=(1, 1), pads=((0, 0), (0, 0))))
@example(image=Image(h=2, w=2, kernel=(3, 3), pads=((0, 0), (0, 0))))
def test_convolutions_agree_with_numpy(isa: str, native, image: Image):
    with isa_set(isa) as there:
        needs(isa, there)
        run_conv(image)
