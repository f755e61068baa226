"""Packed weights of the native TensorFlow operators: what is packed comes back, and nothing else is believed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paring.errors import InputError
from paring.formats.saved_model import packed

KERNELS = st.tuples(st.integers(1, 3), st.integers(1, 3))
SIZES = {
    "kernel": KERNELS,
    "inputs": st.integers(1, 40),
    "outputs": st.integers(1, 40),
    "seed": st.integers(0, 2**20),
}


@given(**SIZES, block=st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_int4_comes_back(kernel: tuple[int, int], inputs: int, outputs: int, seed: int, block: int):
    rng, depth = np.random.default_rng(seed), kernel[0] * kernel[1] * inputs
    codes = rng.integers(-8, 8, (depth, outputs)).astype(np.int8)
    scales = rng.standard_normal((-(-depth // block), outputs)).astype(np.float16)
    blob = packed.pack_int4(codes, scales, block, kernel)
    found = packed.unpack(blob)
    assert (found.kind, found.kernel, found.inputs, found.block) == (packed.INT4, kernel, inputs, block)
    np.testing.assert_array_equal(found.weights, codes)
    np.testing.assert_array_equal(found.scales, scales)
    assert blob.size <= 64 + 63 + (depth + 1) // 2 * outputs + 2 * scales.size


@given(**SIZES, dtype=st.sampled_from((np.float32, np.int8)), density=st.sampled_from((0.0, 0.1, 1.0)))
@settings(max_examples=60, deadline=None)
def test_sparse_weights_come_back(
    kernel: tuple[int, int], inputs: int, outputs: int, seed: int, dtype: type, density: float
):
    rng, depth = np.random.default_rng(seed), kernel[0] * kernel[1] * inputs
    weights = (rng.integers(-127, 128, (outputs, depth)) * (rng.random((outputs, depth)) < density)).astype(dtype)
    blob = packed.pack_sparse(weights, kernel)
    found = packed.unpack(blob)
    assert (found.kernel, found.inputs, found.weights.dtype) == (kernel, inputs, dtype)
    np.testing.assert_array_equal(found.weights, weights)
    assert blob.size == -(-(64 + outputs * -(-depth // 8)) // 64) * 64 + np.count_nonzero(weights) * weights.itemsize


@given(data=st.data(), kind=st.sampled_from(("int4", "float32", "int8")))
@settings(max_examples=300, deadline=None)
def test_damaged_blobs_are_read_or_refused(data: st.DataObject, kind: str):
    rng = np.random.default_rng(data.draw(st.integers(0, 3)))
    if kind == "int4":
        blob = packed.pack_int4(rng.integers(-8, 8, (9, 5)).astype(np.int8), np.ones((3, 5), np.float16), 4)
    else:
        blob = packed.pack_sparse((rng.integers(-2, 3, (5, 9))).astype(kind))
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, 63) | st.integers(0, blob.size - 1))] = data.draw(st.integers(-128, 127))
    blob = blob[: data.draw(st.just(blob.size) | st.integers(0, blob.size))]
    try:
        assert packed.unpack(blob).weights.size
    except InputError as error:
        assert "cannot read packed weights" in str(error)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packed.pack_int4(np.full((2, 2), 8, np.int8), np.ones((1, 2), np.float16), 2), "got 8 to 8"),
        (lambda: packed.pack_int4(np.zeros((2, 2), np.int8), np.ones((2, 2), np.float16), 2), "float16 scales [1, 2]"),
        (lambda: packed.pack_int4(np.zeros((2, 2), np.int8), np.ones((1, 2), np.float16), 0), "float16 scales []"),
        (lambda: packed.pack_int4(np.zeros((2, 2)), np.ones((1, 2), np.float16), 2), "a matrix of int8"),
        (lambda: packed.pack_sparse(np.full((1, 1), -128, np.int8)), "from -127 to 127"),
        (lambda: packed.pack_sparse(np.full((1, 1), np.nan, np.float32)), "finite weights"),
        (lambda: packed.pack_sparse(np.ones((1, 1))), "got float64"),
        (lambda: packed.pack_sparse(np.ones((1, 5), np.float32), (2, 1)), "2 x 1 kernel"),
        (lambda: packed.pack_sparse(np.ones((0, 5), np.float32)), "with elements"),
    ],
)
def test_what_cannot_be_packed_is_refused(call, message: str):
    with pytest.raises(InputError) as caught:
        call()
    assert message in str(caught.value)
