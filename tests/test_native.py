"""Every kernel of the native library against NumPy, under every instruction set that this machine has.

Integers must be equal bit for bit to XNNPACK's arithmetic: what users compare with is default LiteRT.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paring.runtime import native as api
from paring.runtime.native import F32, QD8, S8

ISAS = ("portable", "avx2", "avx2vnni", "avx512", "avx512vnni")
NO_BOUNDS, RELU, RELU6, RELU1 = (-np.inf, np.inf), (0.0, np.inf), (0.0, 6.0), (-1.0, 1.0)


@contextmanager
def isa_set(name: str) -> Iterator[bool]:
    """Within, `name` is in force; False where machine or build do not have it."""
    before = api.isa()
    try:
        yield bool(api.library().paring_set_isa(name.encode()))
    finally:
        assert api.library().paring_set_isa(before.encode())


def rows() -> list[tuple[str, str, int]]:
    """(instruction set, kernel, type) of every row that runs here; empty without a library."""
    try:
        api.delegate_path()
    except api.NativeError:
        return []
    found = []
    for isa in ISAS:
        with isa_set(isa) as there:
            if there:
                found += [(isa, row.name.decode(), row.type) for row in api.kernels() if row.isa.decode() == isa]
    return found


ROWS = rows()
EVERY_ROW = pytest.mark.parametrize(
    ("isa", "kernel", "type"), ROWS or [("", "", 0)], ids=["-".join(r[:2]) for r in ROWS] or ["none"]
)


# -- layers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer and an input shape, both drawn from `seed`.

    Attributes:
      density: Share of blocks that are not zero.
      block: Outputs and inputs of a block of zeros.
      factor: s8: about how many quanta of the result one quantum of the product is; above 1 most results saturate.
    """

    n: int = 1
    h: int = 1
    w: int = 1
    inputs: int = 32
    outputs: int = 32
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    same: bool = False
    density: float = 0.3
    block: tuple[int, int] = (1, 1)
    bounds: tuple[float, float] = NO_BOUNDS
    bias: bool = True
    per_channel: bool = True
    factor: float = 0.01
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Drawn:
    """The arrays of a case."""

    case: Case
    type: int
    x: np.ndarray
    weights: np.ndarray
    bias: np.ndarray | None
    weight_scale: np.ndarray
    grids: tuple[float, int, float, int]  # scale and zero point of input and result


def draw(case: Case, type: int) -> Drawn:
    rng = np.random.default_rng(case.seed)
    shape = (case.outputs, *case.kernel, case.inputs)
    high, wide = case.block
    kept = rng.random((-(-case.outputs // high), *case.kernel, -(-case.inputs // wide))) < case.density
    mask = kept.repeat(high, 0).repeat(wide, 3)[: case.outputs, :, :, : case.inputs]
    image = (case.n, case.h, case.w, case.inputs)
    scales = rng.uniform(0.5, 1.5, case.outputs if case.per_channel else 1).astype(np.float32)
    if type == F32:
        weights = np.where(mask, rng.standard_normal(shape), 0).astype(np.float32)
        x = rng.standard_normal(image).astype(np.float32)
        bias = rng.standard_normal(case.outputs).astype(np.float32)
        return Drawn(case, type, x, weights, bias if case.bias else None, scales, (0, 0, 0, 0))
    weights = np.where(mask, rng.integers(-127, 128, shape), 0).astype(np.int8)
    if type == QD8:
        x = (rng.standard_normal(image) * 3 + rng.uniform(-2, 2)).astype(np.float32)
        bias = rng.standard_normal(case.outputs).astype(np.float32)
        return Drawn(case, type, x, weights, bias if case.bias else None, scales / np.float32(100), (0, 0, 0, 0))
    x = rng.integers(-128, 128, image).astype(np.int8)
    bias = rng.integers(-3000, 3000, case.outputs).astype(np.int32)
    x_scale, y_scale = rng.uniform(0.01, 0.1, 2).astype(np.float32)
    scales *= np.float32(case.factor) * y_scale / x_scale
    x_zero, y_zero = (int(zero) for zero in rng.integers(-128, 128, 2))
    return Drawn(case, type, x, weights, bias if case.bias else None, scales, (x_scale, x_zero, y_scale, y_zero))


def conv(drawn: Drawn) -> api.Conv:
    def at(array: np.ndarray | None) -> int | None:
        return None if array is None else array.ctypes.data

    case, (x_scale, x_zero, y_scale, y_zero) = drawn.case, drawn.grids
    return api.Conv(
        drawn.type, case.outputs, *case.kernel, case.inputs, *case.stride, *case.dilation, case.same,
        at(drawn.weights), at(drawn.bias), at(drawn.weight_scale), drawn.weight_scale.size,
        x_scale, y_scale, x_zero, y_zero, *case.bounds,
    )  # fmt: skip


def run(drawn: Drawn, kernel: str | None) -> tuple[np.ndarray | None, str]:
    """The result of the native library, and the name of its kernel; None and the reason where it packs no such layer."""
    case, described, message = drawn.case, conv(drawn), ctypes.create_string_buffer(300)
    library, name = api.library(), None if kernel is None else kernel.encode()
    layer = library.paring_pack(ctypes.byref(described), name, case.h * case.w, message, len(message))
    if not layer:
        return None, message.value.decode()
    # What was packed must not look at the weights again.
    drawn.weights.fill(99)
    try:
        used = library.paring_layer_describe(layer).kernel.decode()
        plan = library.paring_plan_new(layer, case.n, case.h, case.w, case.threads)
        shape = (ctypes.c_int32(), ctypes.c_int32())
        library.paring_output_shape(ctypes.byref(described), case.h, case.w, *map(ctypes.byref, shape))
        if min(size.value for size in shape) < 1:
            assert not plan
            return np.zeros((case.n, 0, 0, case.outputs)), used
        size = (case.n, shape[0].value, shape[1].value, case.outputs)
        # Guards on both sides: a kernel must not write one byte beyond its result.
        room = np.full(np.prod(size) + 128, 77, np.int8 if drawn.type == S8 else np.float32)
        y = room[64:-64].reshape(size)
        try:
            for _ in range(2):  # a plan may be run again
                library.paring_run(plan, drawn.x.ctypes.data, y.ctypes.data)
        finally:
            library.paring_plan_delete(plan)
        assert (room[:64] == 77).all() and (room[-64:] == 77).all()
        return y, used
    finally:
        library.paring_layer_delete(layer)


# -- the same in NumPy -------------------------------------------------------------------------------------------------


def products(drawn: Drawn, x: np.ndarray) -> np.ndarray:
    """Sums of products, exact for integers; `x` float64 or int64, zero where the padding is."""
    case = drawn.case
    sizes = []
    for axis in (0, 1):
        reach = (case.kernel[axis] - 1) * case.dilation[axis] + 1
        given, step = x.shape[1 + axis], case.stride[axis]
        out = -(-given // step) if case.same else max(0, (given - reach) // step + 1)
        around = max(0, (out - 1) * step + reach - given) if case.same else 0
        sizes.append((out, around // 2, around - around // 2))
    (rows, top, bottom), (columns, left, right) = sizes
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    found = np.zeros((case.n, rows, columns, case.outputs), x.dtype)
    if not found.size:
        return np.zeros((case.n, 0, 0, case.outputs), x.dtype)
    for i in range(case.kernel[0]):
        for j in range(case.kernel[1]):
            down, across = i * case.dilation[0], j * case.dilation[1]
            part = padded[:, down :: case.stride[0], across :: case.stride[1]][:, :rows, :columns]
            found += part @ drawn.weights[:, i, j, :].T.astype(x.dtype)
    return found


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in float32, rounded once: through float64 rounded to odd, from which rounding again does no harm."""
    product, c = a.astype(np.float64) * b, np.asarray(c, np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = total.view(np.int64) % 2 == 0
    return np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total).astype(np.float32)


def expected_f32(drawn: Drawn) -> tuple[np.ndarray, float]:
    """The result in double precision, and the difference allowed: 1e-5 of its largest value before the activation."""
    real = products(drawn, drawn.x.astype(np.float64)) + (0 if drawn.bias is None else drawn.bias)
    return np.clip(real, *drawn.case.bounds), 1e-5 * float(np.abs(real).max(initial=0))


def expected_s8(drawn: Drawn) -> np.ndarray:
    """XNNPACK's: scaled in float, bounded above, rounded half to even, shifted with saturation, bounded below."""
    x_scale, x_zero, y_scale, y_zero = drawn.grids
    total = products(drawn, drawn.x.astype(np.int64) - x_zero) + (0 if drawn.bias is None else drawn.bias)
    low, high = (
        np.clip(np.rint(np.float32(bound) / np.float32(y_scale)) + y_zero, -128, 127) for bound in drawn.case.bounds
    )
    scaled = total.astype(np.float32) * (np.float32(x_scale) * drawn.weight_scale / np.float32(y_scale))
    rounded = np.rint(np.minimum(scaled, np.float32(high - y_zero)))
    return np.maximum(np.clip(rounded, -32768, 32767) + y_zero, low).clip(-128, 127).astype(np.int8)


def expected_qd8(drawn: Drawn) -> np.ndarray:
    """XNNPACK's: each image (each row of a dense layer) on the grid of its own range, zero within; see fc_qd8."""
    x, one = drawn.x, np.float32(1)
    low, high = (np.minimum(x.min((1, 2, 3)), 0), np.maximum(x.max((1, 2, 3)), 0))
    spread = np.where(high > low, high - low, one)
    factor = np.where(high > low, np.float32(255) / spread, one).astype(np.float32)
    below, above = low * factor, high * factor
    zero = np.where((below - 128) + (above + 127) > 0, -128 - below, 127 - above).astype(np.float32)
    zero = np.rint(np.clip(zero, -128, 127)).astype(np.int64)[:, None, None, None]
    codes = np.clip(np.rint(x * factor[:, None, None, None]).astype(np.int64) + zero, -128, 127)
    real = products(drawn, codes - zero).astype(np.float32) * (one / factor)[:, None, None, None]
    bias = np.zeros(drawn.case.outputs, np.float32) if drawn.bias is None else drawn.bias
    found = fused(real, np.broadcast_to(drawn.weight_scale, (drawn.case.outputs,)), bias)
    return np.clip(found, *np.float32(drawn.case.bounds))


def check(case: Case, type: int, isa: str, kernel: str | None) -> bool:
    """Compares; False where the kernel does not take such a layer, and says why."""
    drawn = draw(case, type)
    if type == F32:
        wanted, difference = expected_f32(drawn)
    else:
        wanted = expected_s8(drawn) if type == S8 else expected_qd8(drawn)
        difference = 0.0
    with isa_set(isa) as there:
        assert there
        found, used = run(drawn, kernel)
    if found is None:
        assert kernel is not None, f"nothing takes {case}: {used}"
        assert used  # a reason
        return False
    assert kernel is None or used == kernel
    np.testing.assert_allclose(found, wanted, rtol=0, atol=difference, err_msg=f"{used}: {case}")
    return True


# -- tests -------------------------------------------------------------------------------------------------------------

CASES = st.builds(
    Case,
    n=st.integers(1, 3),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    inputs=st.integers(1, 70),
    outputs=st.integers(1, 70),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    same=st.booleans(),
    density=st.sampled_from((0.0, 0.05, 0.3, 1.0)),
    block=st.sampled_from(((1, 1), (4, 1), (8, 1), (16, 1), (4, 4), (16, 4))),
    bounds=st.sampled_from((NO_BOUNDS, RELU, RELU6, RELU1)),
    bias=st.booleans(),
    per_channel=st.booleans(),
    factor=st.sampled_from((0.0005, 0.01, 2.5)),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**20),
)
PLAIN = Case(h=5, w=7, outputs=48, inputs=40, bounds=RELU)
DENSE = Case(n=5, outputs=100, inputs=130, threads=2)


@EVERY_ROW
def test_every_kernel_takes_a_plain_layer(isa: str, kernel: str, type: int, native):
    assert check(PLAIN, type, isa, kernel)


@EVERY_ROW
@given(case=CASES)
@settings(max_examples=40, deadline=None)
@example(case=PLAIN)
@example(case=DENSE)
@example(case=replace(DENSE, n=1, density=0.0))
@example(case=replace(DENSE, n=1, density=1.0, inputs=1100, outputs=1030))
@example(case=replace(PLAIN, h=28, w=28, kernel=(3, 3), same=True, threads=2, density=0.1))
@example(case=replace(PLAIN, h=13, w=1, kernel=(3, 1), stride=(2, 2), dilation=(2, 1), inputs=3, outputs=17))
def test_kernels_agree_with_numpy(isa: str, kernel: str, type: int, native, case: Case):
    check(case, type, isa, kernel)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type", [F32, S8, QD8], ids=["f32", "s8", "qd8"])
@given(case=CASES)
@settings(max_examples=40, deadline=None)
def test_some_kernel_takes_every_layer(isa: str, type: int, native, case: Case):
    with isa_set(isa) as there:
        if not there:
            pytest.skip(f"this processor has no {isa}")
    assert check(case, type, isa, None)


def test_every_instruction_set_has_kernels_of_every_type(native):
    assert {(isa, type) for isa, _, type in ROWS} >= {("portable", type) for type in (F32, S8, QD8)}
    for isa in ISAS:
        with isa_set(isa) as there:
            assert not there or {row.type for row in api.kernels()} == {F32, S8, QD8}


def test_describing_counts_zeros(native):
    drawn = draw(replace(DENSE, block=(16, 4), density=0.25), F32)
    nonzeros = np.count_nonzero(drawn.weights)
    described = conv(drawn)
    layer = native.library().paring_pack(ctypes.byref(described), None, 1, None, 0)
    info = native.library().paring_layer_describe(layer)
    assert info.nonzeros == nonzeros <= info.stored < drawn.weights.size and info.bytes >= 4 * nonzeros
    native.library().paring_layer_delete(layer)


@pytest.mark.parametrize("name", [b"", b"avx1024", b"AVX2 "])
def test_unknown_instruction_sets_change_nothing(native, name: bytes):
    before = native.isa()
    assert not native.library().paring_set_isa(name)
    assert native.isa() == before


def test_an_unknown_kernel_is_refused_with_its_name(native):
    found, reason = run(draw(PLAIN, F32), "f32_warp_drive")
    assert found is None and "f32_warp_drive" in reason


def test_estimates_are_times_and_grow_with_the_work(native):
    case = replace(DENSE, inputs=1024, outputs=1024, density=0.1, block=(16, 1))
    described = conv(drawn := draw(case, F32))
    layer = native.library().paring_pack(ctypes.byref(described), None, 1, None, 0)
    one, many = (native.library().paring_estimate(layer, n, 1, 1, 1) for n in (1, 64))
    dense = native.library().paring_estimate_dense(ctypes.byref(described), 64, 1, 1, 1)
    assert 0 < one < many < dense < 1.0
    native.library().paring_layer_delete(layer)
    assert drawn.case is case
