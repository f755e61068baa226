"""Paring's TensorFlow operators: their values, in every way TensorFlow runs them, and what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import needs
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paring.errors import UnsupportedError
from paring.formats.saved_model import packed
from paring.runtime import native

KINDS = ("int4", "float32", "int8")
TYPES = st.sampled_from(((False, False), (False, True), (True, False)))  # bfloat16 activations, rounding


def numbers(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, nearest and ties to even, as float32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def activations(tf: Any, x: np.ndarray, short: bool, rounded: bool) -> tuple[Any, np.ndarray]:
    """What the operator gets, and the values it then multiplies with, float64."""
    seen = bfloat16(x) if short or rounded else x
    return tf.constant(x, tf.bfloat16 if short else tf.float32), seen.astype(np.float64)


def agree(found: Any, wanted: np.ndarray, depth: int, short: bool) -> None:
    """Within the error of float32 sums, and half a unit of a bfloat16 result."""
    assert found.dtype.name == ("bfloat16" if short else "float32")
    values = np.asarray(found).astype(np.float64)
    assert values.shape == wanted.shape
    largest = np.abs(wanted).max(initial=0)
    allowed = 2e-6 * np.sqrt(depth + 1) * largest + (np.abs(wanted) * 2**-8 if short else 0)
    assert (np.abs(values - wanted) <= allowed).all(), np.abs(values - wanted).max()


def pack(kind: str, depth: int, outputs: int, seed: int, block: int = 5, kernel: tuple[int, int] = (1, 1)):
    """A blob and the weights in it, float64 [depth, outputs]."""
    random = numbers(seed)
    if kind == "int4":
        codes = random.integers(-8, 8, (depth, outputs)).astype(np.int8)
        scales = random.uniform(0.1, 2, (-(-depth // block), outputs)).astype(np.float16)
        return packed.pack_int4(codes, scales, block, kernel), codes * scales.astype(float).repeat(block, 0)[:depth]
    weights = (random.integers(-127, 128, (outputs, depth)) * (random.random((outputs, depth)) < 0.3)).astype(kind)
    return packed.pack_sparse(weights, kernel), weights.T.astype(np.float64)


# -- values ----------------------------------------------------------------------------------------------------------


BATCHES = (  # of x, of the weights
    ((), ()), ((3,), ()), ((0,), ()), ((2, 0), ()), ((2,), (2,)), ((1,), (3,)), ((2, 1), (1, 3)), ((), (2, 2)),
    ((4,), (1,)), ((3, 2), (2,)), ((0,), (1,)),
)  # fmt: skip


@given(
    ahead=st.sampled_from(BATCHES),
    sizes=st.tuples(st.integers(0, 5), st.integers(0, 70), st.integers(0, 40)),
    types=TYPES,
    transposed=st.booleans(),
    own=st.booleans(),
    seed=st.integers(0, 99),
)
@example(((), ()), (1, 300, 200), (False, True), False, False, 0)
@example(((), ()), (40, 33, 130), (True, False), True, False, 1)
@settings(max_examples=150, deadline=None)
def test_matmul_is_numpys(tensorflow, operators, ahead, sizes, types, transposed, own, seed: int):
    (m, k, n), (short, rounded), random = sizes, types, numbers(seed)
    x = random.standard_normal((*ahead[0], m, k)).astype(np.float32)
    weights = random.integers(-127, 128, (*ahead[1], k, n)).astype(np.int8)
    scale = random.uniform(0.01, 0.1, (*ahead[1], 1, n) if own else (n,)).astype(np.float32)
    given_x, seen = activations(tensorflow, x, short, rounded)
    stored = np.ascontiguousarray(weights.swapaxes(-1, -2)) if transposed else weights
    found = operators.import_paring_tensorflow_mat_mul(
        given_x, stored, scale, round_to_bfloat16=rounded, transpose_weights=transposed
    )
    agree(found, (seen @ weights) * scale, k, short)


def test_a_vector_is_multiplied(operators):
    found = operators.import_paring_tensorflow_mat_mul([1.0, 2.0], np.array([[1, 2, 3], [4, 5, 6]], np.int8), [1.0] * 3)
    assert found.numpy().tolist() == [9, 12, 15]


CONVOLUTIONS = {
    "image": st.tuples(st.integers(0, 2), st.integers(5, 11), st.integers(5, 11)),
    "channels": st.tuples(st.integers(1, 20), st.integers(1, 20)),
    "kernel": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "strides": st.tuples(st.integers(1, 3), st.integers(1, 3)),
    "dilations": st.sampled_from(((1, 1), (2, 1), (2, 2))),
    "padding": st.sampled_from(("SAME", "VALID", ((0, 0), (1, 2), (0, 3), (0, 0)))),
    "types": TYPES,
    "seed": st.integers(0, 99),
}


def convolve(tf: Any, call: Callable[..., Any], x, dense, scale, kernel, strides, dilations, padding, types, **more):
    """Calls an operator, and TensorFlow's own on float weights [h, w, inputs, outputs]."""
    (short, rounded), explicit = types, not isinstance(padding, str)
    given_x, seen = activations(tf, x, short, rounded)
    sizes = [size for pair in padding for size in pair] if explicit else []
    found = call(
        given_x, scale=scale, round_to_bfloat16=rounded, strides=[1, *strides, 1], dilations=[1, *dilations, 1],
        padding="EXPLICIT" if explicit else padding, explicit_paddings=sizes, **more,
    )  # fmt: skip
    if explicit:
        seen, padding = np.pad(seen, padding), "VALID"
    # Dilated by hand: not every build of TensorFlow has dilated convolutions with strides for processors.
    wide = np.zeros(tuple((size - 1) * d + 1 for size, d in zip(kernel, dilations, strict=True)) + dense.shape[2:])
    wide[:: dilations[0], :: dilations[1]] = dense
    wanted = tf.nn.conv2d(seen, wide, strides, padding).numpy() * scale
    agree(found, wanted, kernel[0] * kernel[1] * x.shape[3], short)


@given(**CONVOLUTIONS)
@settings(max_examples=60, deadline=None)
def test_conv_is_tensorflows(tensorflow, operators, image, channels, kernel, strides, dilations, padding, types, seed):
    random = numbers(seed)
    x = random.standard_normal((*image, channels[0])).astype(np.float32)
    weights = random.integers(-127, 128, (*kernel, *channels)).astype(np.int8)
    scale = random.uniform(0.01, 0.1, channels[1]).astype(np.float32)
    call = operators.import_paring_tensorflow_conv2d
    convolve(tensorflow, call, x, weights, scale, kernel, strides, dilations, padding, types, weights=weights)


@given(kind=st.sampled_from(KINDS), **CONVOLUTIONS)
@settings(max_examples=90, deadline=None)
def test_packed_conv_is_tensorflows(
    tensorflow, operators, kind, image, channels, kernel, strides, dilations, padding, types, seed
):
    random = numbers(seed)
    x = random.standard_normal((*image, channels[0])).astype(np.float32)
    blob, weights = pack(kind, kernel[0] * kernel[1] * channels[0], channels[1], seed, kernel=kernel)
    scale = random.uniform(0.01, 0.1, channels[1]).astype(np.float32)
    call = operators.import_paring_tensorflow_packed_conv2d
    weights = weights.reshape(*kernel, *channels)
    convolve(tensorflow, call, x, weights, scale, kernel, strides, dilations, padding, types, packed=blob)


@given(
    kind=st.sampled_from(KINDS),
    ahead=st.sampled_from(((), (1,), (7,), (0,), (2, 3))),
    sizes=st.tuples(st.integers(1, 90), st.integers(1, 50)),
    block=st.integers(1, 70),
    types=TYPES,
    ones=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=120, deadline=None)
def test_packed_matmul_is_numpys(tensorflow, operators, kind, ahead, sizes, block, types, ones, seed):
    (k, n), (short, rounded), random = sizes, types, numbers(seed)
    x = random.standard_normal((*ahead, k)).astype(np.float32)
    blob, weights = pack(kind, k, n, seed, block)
    scale = np.ones(n, np.float32) if ones else random.uniform(0.01, 0.1, n).astype(np.float32)
    given_x, seen = activations(tensorflow, x, short, rounded)
    found = operators.import_paring_tensorflow_packed_mat_mul(given_x, blob, scale, round_to_bfloat16=rounded)
    agree(found, (seen @ weights) * scale, k, short)


def test_dynamic_activations_have_a_grid_for_each_row_and_image(operators):
    """On rows that reach from -128 to 127 times a power of two, 8 bits lose nothing."""
    x = numbers(0).integers(-128, 128, (6, 50)).astype(np.float32)
    x[:, 0], x[:, 1] = -128, 127
    x *= 2.0 ** np.arange(-3, 3, dtype=np.float32)[:, None]
    blob, weights = pack("int8", 50, 20, 1)
    call, scale = operators.import_paring_tensorflow_packed_mat_mul, np.full(20, 0.5, np.float32)
    np.testing.assert_array_equal(call(x, blob, scale, dynamic=True), x @ weights * 0.5)
    x += np.float32(0.3)
    lost = np.abs(call(x, blob, scale, dynamic=True) - x @ weights * 0.5)
    assert (lost > 1e-3).any()
    step = (x.max(1) - x.min(1).clip(max=0)) / 255
    assert (lost <= step[:, None] * 0.51 * np.abs(weights).sum(0)).all()

    image = x.reshape(6, 5, 5, 2)
    blob, weights = pack("int8", 18, 20, 2, kernel=(3, 3))
    conv = operators.import_paring_tensorflow_packed_conv2d
    options = {"strides": [1, 1, 1, 1], "padding": "VALID"}
    lost = np.abs(conv(image, blob, scale, dynamic=True, **options) - conv(image, blob, scale, **options))
    assert (lost.max((1, 2)) <= step[:, None] * 0.51 * np.abs(weights).sum(0)).all()


def test_bytes_may_begin_anywhere(tensorflow, operators):
    """A slice of a vector shares its memory, at an odd address."""
    call, x = operators.import_paring_tensorflow_packed_mat_mul, np.ones((2, 30), np.float32)
    for kind in KINDS:
        blob, weights = pack(kind, 30, 9, 0)
        shifted = tensorflow.concat([np.zeros(1, np.int8), blob], 0)[1:]
        agree(call(x, shifted, np.ones(9, np.float32)), x @ weights, 30, False)


# -- what is refused ---------------------------------------------------------------------------------------------------


@given(kind=st.sampled_from((*KINDS, "dynamic")), conv=st.booleans(), data=st.data())
@settings(max_examples=400, deadline=None)
def test_a_damaged_blob_gives_a_value_or_an_error(tensorflow, operators, kind: str, conv: bool, data: st.DataObject):
    dynamic, kernel = kind == "dynamic", (3, 1) if conv else (1, 1)
    blob, _ = pack("int8" if dynamic else kind, 12, 5, data.draw(st.integers(0, 2)), kernel=kernel)
    for _ in range(data.draw(st.integers(1, 3))):
        blob[data.draw(st.integers(0, 63) | st.integers(0, blob.size - 1))] = data.draw(st.integers(-128, 127))
    blob = blob[: data.draw(st.just(blob.size) | st.integers(0, blob.size))]
    scale = np.ones(5, np.float32)
    try:
        if conv:
            call, more = operators.import_paring_tensorflow_packed_conv2d, {"strides": [1] * 4, "padding": "SAME"}
            found = call(np.ones((1, 4, 3, 4), np.float32), blob, scale, dynamic=dynamic, **more)
        else:
            found = operators.import_paring_tensorflow_packed_mat_mul(
                np.ones((2, 12), np.float32), blob, scale, dynamic=dynamic
            )
    except (tensorflow.errors.InvalidArgumentError, tensorflow.errors.UnimplementedError) as error:
        assert "expected" in str(error) and "got" in str(error)
    else:
        assert found.shape[-1] == 5


def blob_of(weights: str = "int8", **parts: Any) -> np.ndarray:
    """A blob of 12 x 5 with other fields in its header, by the name of the field."""
    blob, _ = pack(weights, 12, 5, 0)
    places = {"kind": 8, "kernel_h": 12, "kernel_w": 16, "inputs": 20, "outputs": 24, "block": 28, "nonzeros": 32}
    for name, value in parts.items():
        width = 8 if name == "nonzeros" else 4
        blob[places[name] : places[name] + width] = np.frombuffer(value.to_bytes(width, "little", signed=True), np.int8)
    return blob


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (np.zeros(63, np.int8), "a header of 64 bytes, got 63"),
        (np.zeros(64, np.int8), "weights that paring has packed"),
        (blob_of(kind=4), "kind 1, 2 or 3, got 4"),
        (blob_of(outputs=0), "sizes of at least 1, got 0"),
        (blob_of(inputs=-12), "sizes of at least 1, got -12"),
        (blob_of(inputs=2**31 - 1, kernel_h=2**31 - 1, kernel_w=2**31 - 1), "a header that fits its bytes"),
        (blob_of(nonzeros=2**62), "a header that fits its bytes"),
        (blob_of(nonzeros=-1), "a count of its kind"),
        (blob_of(kind=2, nonzeros=0), "a header that fits its bytes"),
        (blob_of("int4", block=0), "a block of at least 1, got 0"),
        (blob_of("int4", block=-(2**31)), "a block of at least 1"),
        (blob_of(block=3), "no block, got 3"),
        (blob_of(kernel_h=2, inputs=6), "a matrix, got a kernel of 2 x 1"),
        (blob_of()[None], "a vector of bytes"),
    ],
)
def test_what_is_wrong_with_a_blob_is_said(tensorflow, operators, blob: np.ndarray, message: str):
    with pytest.raises(tensorflow.errors.InvalidArgumentError) as caught:
        operators.import_paring_tensorflow_packed_mat_mul(np.ones((2, 12), np.float32), blob, np.ones(5, np.float32))
    assert message in str(caught.value)


ONE = {"strides": [1, 1, 1, 1], "padding": "SAME"}
EXPLICIT = {"strides": [1, 1, 1, 1], "padding": "EXPLICIT"}
REFUSED = {  # operator, shapes of x, weights and scale, attributes; what the error says
    "inputs": ("mat_mul", ([2, 3], [4, 5], [5]), {}, "expected 4 values"),
    "scale": ("mat_mul", ([2, 4], [4, 5], [4]), {}, "scale: expected the shape [5]"),
    "scale of a batch": ("mat_mul", ([2, 2, 4], [2, 4, 5], [3, 1, 5]), {}, "[2, 1, 5]"),
    "scalar weights": ("mat_mul", ([2, 4], [], [4]), {}, "rank 2 or more"),
    "scalar scale": ("mat_mul", ([2, 4], [4, 5], []), {}, "scale: expected the shape [5]"),
    "batch": ("mat_mul", ([2, 2, 4], [3, 4, 5], [5]), {}, "that broadcast"),
    "vector": ("mat_mul", ([4], [3, 4, 5], [5]), {}, "rank 2 or more"),
    "huge": ("mat_mul", ([2**31, 2**20, 0], [0, 2**31], [0]), {}, "scale: expected"),
    "groups": ("conv2d", ([1, 3, 3, 4], [1, 1, 2, 6], [6]), ONE, "grouped"),
    "channels": ("conv2d", ([1, 3, 3, 5], [1, 1, 2, 6], [6]), ONE, "2 channels"),
    "image": ("conv2d", ([1, 1, 3, 2], [3, 1, 2, 6], [6]), ONE | {"padding": "VALID"}, "hold a kernel of 3"),
    "rank": ("conv2d", ([3, 3, 2], [1, 1, 2, 6], [6]), ONE, "expected [images, height"),
    "no stride": ("conv2d", ([1, 3, 3, 2], [1, 1, 2, 6], [6]), ONE | {"strides": [1, 0, 1, 1]}, "strides: expected"),
    "three strides": ("conv2d", ([1, 3, 3, 2], [1, 1, 2, 6], [6]), ONE | {"strides": [1, 1, 1]}, "expected 4 numbers"),
    "stride of images": ("conv2d", ([1, 3, 3, 2], [1, 1, 2, 6], [6]), ONE | {"strides": [2, 1, 1, 1]}, "[2, 1, 1, 1]"),
    "paddings": ("conv2d", ([1, 3, 3, 2], [1, 1, 2, 6], [6]), EXPLICIT, "expected 8 numbers"),
    "negative": (
        "conv2d", ([1, 3, 3, 2], [1, 1, 2, 6], [6]), EXPLICIT | {"explicit_paddings": [0, 0, -1, 0, 0, 0, 0, 0]},
        "explicit_paddings: expected",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(tensorflow, operators, case: str):
    name, (x, weights, scale), options, message = REFUSED[case]
    arguments = (np.ones(x, np.float32), np.ones(weights, np.int8), np.ones(scale, np.float32))
    with pytest.raises(tensorflow.errors.OpError) as caught:
        getattr(operators, f"import_paring_tensorflow_{name}")(*arguments, **options)
    assert message in str(caught.value)


def test_a_result_beyond_all_memory_is_refused(tensorflow, operators):
    """TensorFlow itself would end the process over such a shape."""
    x, weights = np.ones((2**41, 0), np.float32), np.ones((0, 2**20), np.int8)
    with pytest.raises(tensorflow.errors.ResourceExhaustedError, match=r"2\^60 elements"):
        operators.import_paring_tensorflow_mat_mul(x, weights, np.ones(2**20, np.float32))


def test_only_sparse_int8_takes_dynamic_activations(tensorflow, operators):
    for blob in (blob_of("float32"), blob_of("int4")):
        with pytest.raises(tensorflow.errors.InvalidArgumentError, match="sparse int8 weights"):
            x = np.ones((2, 12), np.float32)
            operators.import_paring_tensorflow_packed_mat_mul(x, blob, np.ones(5, np.float32), dynamic=True)


def test_a_gradient_is_refused_by_name(tensorflow, operators):
    x = tensorflow.ones((2, 3))
    with tensorflow.GradientTape() as tape:
        tape.watch(x)
        y = operators.import_paring_tensorflow_mat_mul(x, np.ones((3, 4), np.int8), [1.0] * 4)
    with pytest.raises(
        UnsupportedError, match=r"cannot differentiate for ImportParingTensorflow>MatMul.*Train the float"
    ):
        tape.gradient(y, x)


def test_compiling_with_xla_names_the_operator(tensorflow, operators):
    @tensorflow.function(jit_compile=True)
    def compiled(x):
        return operators.import_paring_tensorflow_mat_mul(x, np.ones((3, 4), np.int8), [1.0] * 4)

    with pytest.raises(tensorflow.errors.InvalidArgumentError, match=r"ImportParingTensorflow>MatMul.*XLA_CPU_JIT"):
        compiled(tensorflow.ones((2, 3)))


# -- shapes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "weights", "scale", "shape"),
    [
        ([None, 3], [3, 4], [4], [None, 4]),
        ([None, None, 3], [3, 4], [4], [None, None, 4]),
        ([2, 3], [3, 4], None, [2, None]),
        (None, [3, 4], [4], None),
        ([2, 3], None, [4], None),
        ([5, 1, 2, 3], [6, 3, 4], [6, 1, 4], [5, 6, 2, 4]),
        ([None, 2, 3], [6, 3, 4], [4], [6, 2, 4]),
        ([1, 2, 3], [None, 3, 4], [4], [None, 2, 4]),
        ([2, 3], [5, None, 3, 4], [4], [5, None, 2, 4]),
        ([7, None, None, 3], [1, 3, 4], [4], [7, None, None, 4]),
    ],
)
def test_shapes_of_matmul_are_inferred(tensorflow, operators, x, weights, scale, shape):
    with tensorflow.Graph().as_default():
        types = zip((tensorflow.float32, tensorflow.int8, tensorflow.float32), (x, weights, scale), strict=True)
        found = operators.import_paring_tensorflow_mat_mul(*(tensorflow.compat.v1.placeholder(t, s) for t, s in types))
        assert found.shape.as_list() == shape if shape is not None else found.shape.rank is None


def test_shapes_of_the_others_are_inferred(tensorflow, operators):
    tf, placeholder = tensorflow, tensorflow.compat.v1.placeholder
    with tf.Graph().as_default():
        scale, blob = placeholder(tf.float32, [7]), placeholder(tf.int8, [None])
        matmul, conv = operators.import_paring_tensorflow_packed_mat_mul, operators.import_paring_tensorflow_conv2d
        assert matmul(placeholder(tf.bfloat16, [None, 2, 3]), blob, scale).shape.as_list() == [None, 2, 7]
        image, kernel = placeholder(tf.float32, [4, 8, 8, 3]), placeholder(tf.int8, [3, 3, 3, 7])
        assert conv(image, kernel, scale, **ONE).shape.as_list() == [4, None, None, 7]
        with pytest.raises(ValueError, match="expected packed weights of rank 1, got rank 4"):
            matmul(image, kernel, scale)
        with pytest.raises(ValueError, match="that broadcast, got 2 and 5"):
            weights = placeholder(tf.int8, [5, 3, 7])
            operators.import_paring_tensorflow_mat_mul(placeholder(tf.float32, [2, 4, 3]), weights, scale)


# -- where TensorFlow runs them ----------------------------------------------------------------------------------------


def test_values_follow_variables(tensorflow, operators):
    """Layers are packed once for each tensor: a variable that gets another one, or is written over, is another layer."""
    tf, call = tensorflow, operators.import_paring_tensorflow_packed_mat_mul
    x, scale = np.ones((3, 40), np.float32), np.ones(9, np.float32)
    (first, one), (second, two) = pack("float32", 40, 9, 1), pack("float32", 40, 9, 2)
    smaller = min(first.size, second.size)
    variable = tf.Variable(first, shape=[None])
    run = tf.function(lambda: call(x, variable, scale))
    for _ in range(3):
        for blob, weights in ((first, one), (second, two)):
            variable.assign(blob)
            np.testing.assert_allclose(run(), x @ weights, atol=1e-3)
    with tf.Graph().as_default():
        values = np.where(np.arange(first.size) < 64, first, np.roll(first, 0))
        reference = tf.compat.v1.Variable(values, use_resource=False, name="reference")
        negated = first.copy()  # every weight's sign bit turned, in place
        negated[-4 * np.count_nonzero(one) :][3::4] ^= -128
        change = tf.compat.v1.assign(reference, negated)
        product = call(x, tf.identity(reference), scale)
        with tf.compat.v1.Session() as session:
            session.run(reference.initializer)
            np.testing.assert_allclose(session.run(product), x @ one, atol=1e-3)
            session.run(change)
            np.testing.assert_allclose(session.run(product), -(x @ one), atol=1e-3)
    assert smaller > 64


def test_what_was_packed_goes_with_its_tensor(operators):
    """Fresh tensors again and again must not pile up."""
    resident = Path("/proc/self/statm")
    if not resident.exists():
        needs("Linux", "memory is read from /proc")
    call, scale = operators.import_paring_tensorflow_packed_mat_mul, np.ones(500, np.float32)
    x, (blob, _) = np.ones((1, 500), np.float32), pack("float32", 500, 500, 0)

    def pages() -> int:
        return int(resident.read_text().split()[1])

    for _ in range(10):
        call(x, blob, scale)
    before = pages()
    for _ in range(100):  # 0.6 MB each, packed
        call(x, blob, scale)
    assert (pages() - before) * os.sysconf("SC_PAGE_SIZE") < 20e6


def test_a_loop_runs_them(tensorflow, operators):
    tf, scale = tensorflow, np.full(12, 0.1, np.float32)
    weights = numbers(0).integers(-3, 4, (12, 12)).astype(np.int8)
    blob, dense = pack("int8", 12, 12, 1)

    @tf.function(input_signature=[tf.TensorSpec([None, 12]), tf.TensorSpec([], tf.int32)])
    def loop(x, times):
        def body(i, x):
            x = operators.import_paring_tensorflow_mat_mul(x, weights, scale)
            return i + 1, operators.import_paring_tensorflow_packed_mat_mul(x, blob, scale)

        return tf.while_loop(lambda i, _: i < times, body, (0, x))[1]

    x = numbers(1).standard_normal((5, 12)).astype(np.float32)
    wanted = x.astype(np.float64)
    for _ in range(3):
        wanted = wanted @ weights * scale @ dense * scale
    np.testing.assert_allclose(loop(x, 3), wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


def test_constants_are_folded(tensorflow, operators):
    """TensorFlow runs an operator over constants while it optimizes the graph, in a place of its own."""
    x, weights, scale = np.ones((2, 3), np.float32), np.ones((3, 4), np.int8), np.ones(4, np.float32)

    @tensorflow.function
    def folded(y):
        return y + operators.import_paring_tensorflow_mat_mul(x, weights, scale)

    assert (folded(tensorflow.zeros((2, 4))).numpy() == 3).all()
    with tensorflow.Graph().as_default():
        product = operators.import_paring_tensorflow_mat_mul(tensorflow.constant(x), weights, scale)
        shape = tensorflow.zeros(tensorflow.cast(product[0, :2], tensorflow.int32)).shape
        with tensorflow.compat.v1.Session() as session:
            assert (session.run(product) == 3).all()
    assert shape.rank == 2


@pytest.mark.parametrize("kind", KINDS)
def test_several_threads_run_one_node(tensorflow, operators, kind: str):
    random, (blob, weights) = numbers(0), pack(kind, 300, 200, 0)
    scale = np.ones(200, np.float32)

    @tensorflow.function(input_signature=[tensorflow.TensorSpec([None, 300])])
    def run(x):
        return operators.import_paring_tensorflow_packed_mat_mul(x, blob, scale)

    inputs = [random.standard_normal((1 + i % 3 * 20, 300)).astype(np.float32) for i in range(6)]
    wanted = [x @ weights for x in inputs]
    wrong: list[float] = []

    def work(i: int) -> None:
        for j in range(30):
            at = (i + j) % len(inputs)
            error = float(np.abs(run(inputs[at]) - wanted[at]).max())
            if error > 1e-4 * np.abs(wanted[at]).max():
                wrong.append(error)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_two_models_keep_their_weights(tensorflow, operators):
    scale, x = np.ones(20, np.float32), np.ones((2, 30), np.float32)
    pairs = [pack("float32", 30, 20, seed) for seed in (0, 1)]
    call = operators.import_paring_tensorflow_packed_mat_mul
    models = [tensorflow.function(lambda x, blob=blob: call(x, blob, scale)) for blob, _ in pairs]
    for _ in range(2):
        for model, (_, weights) in zip(models, pairs, strict=True):
            np.testing.assert_allclose(model(x), x @ weights, rtol=1e-5)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=os.environ | environment
    )


LOAD = """
import sys
import tensorflow as tf
try:
    tf.saved_model.load(sys.argv[1] if len(sys.argv) > 1 else {folder!r})
except Exception as error:
    print("refused:", str(error).splitlines()[0])
import paring.tensorflow
run = tf.saved_model.load({folder!r}).signatures["serving_default"]
print(*run(x=tf.ones([1, 3]))["y"].numpy().ravel().tolist())
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    tf.compat.v1.saved_model.load(session, ["serve"], {folder!r})
    inputs = session.graph.get_tensor_by_name("serving_default_x:0")
    print(*session.run("StatefulPartitionedCall:0", {{inputs: [[1, 1, 1]]}}).ravel().tolist())
"""


def test_a_saved_model_loads_in_another_process(tensorflow, operators, tmp_path: Path):
    tf = tensorflow
    module, folder = tf.Module(), str(tmp_path / "model")
    module.weights = tf.Variable(np.arange(6, dtype=np.int8).reshape(3, 2))

    @tf.function(input_signature=[tf.TensorSpec([None, 3], name="x")])
    def run(x):
        return {"y": operators.import_paring_tensorflow_mat_mul(x, module.weights, [1.0, 2.0])}

    module.run = run
    options = tf.saved_model.SaveOptions(namespace_whitelist=["ImportParingTensorflow"])
    tf.saved_model.save(module, folder, {"serving_default": run}, options)
    done = python(LOAD.format(folder=folder))
    assert done.returncode == 0, done.stderr
    refused, *values = done.stdout.splitlines()
    assert refused.startswith("refused:") and "Op type not registered 'ImportParingTensorflow>MatMul'" in refused
    assert values == ["6.0 18.0"] * 2


COUNT_THREADS = """
import os
import numpy as np, tensorflow as tf
import paring.tensorflow
tf.config.threading.set_intra_op_parallelism_threads({configured})
operators = tf.load_op_library(paring.tensorflow.library_path())
x, weights, scale = tf.ones([300, 1000]), tf.ones([1000, 1000], tf.int8), tf.ones([1000])
warm = tf.function(lambda x: tf.matmul(x, tf.ones([1000, 1000])))
for _ in range(3):
    warm(x)
before = len(os.listdir("/proc/self/task"))
for run in (operators.import_paring_tensorflow_mat_mul, tf.function(operators.import_paring_tensorflow_mat_mul)):
    run(x, weights, scale)
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_threads_are_as_many_as_tensorflows(operators):
    if not Path("/proc/self/task").exists() or (os.cpu_count() or 1) < 2:
        needs("two processors", "threads are counted in /proc")
    counts = [python(COUNT_THREADS.format(configured=n)) for n in (1, 2)]
    assert [done.returncode for done in counts] == [0, 0], counts[0].stderr + counts[1].stderr
    assert int(counts[0].stdout) == 0 < int(counts[1].stdout)


# -- loading -----------------------------------------------------------------------------------------------------------


def test_loading_twice_changes_nothing(tensorflow, operators):
    import importlib

    module = importlib.reload(importlib.import_module("paring.tensorflow"))
    again = tensorflow.load_op_library(module.library_path())
    assert again.import_paring_tensorflow_mat_mul([[1.0]], np.ones((1, 1), np.int8), [2.0]).numpy() == 2


def test_a_library_that_is_none_is_named(operators, monkeypatch: pytest.MonkeyPatch):
    done = python("import paring.tensorflow", PARING_TENSORFLOW_LIBRARY=__file__)
    assert done.returncode == 1
    assert f"NativeError: cannot register the TensorFlow operators for {__file__}" in done.stderr
    monkeypatch.setenv("PARING_TENSORFLOW_LIBRARY", "/nonexistent.so")
    with pytest.raises(native.NativeError, match="cannot find the native library for PARING_TENSORFLOW_LIBRARY"):
        native.operators_path()


WITHOUT_TENSORFLOW = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "tensorflow":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import paring.tensorflow
"""


def test_without_tensorflow_it_says_so():
    done = python(WITHOUT_TENSORFLOW)
    assert done.returncode == 1
    assert "UnsupportedError: cannot register the TensorFlow operators: expected TensorFlow, got none" in done.stderr


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (None, "expected a process with TensorFlow in it"),
        (("TF_NewStatus", "TF_DeleteStatus"), "expected TF_SetStatus in TensorFlow's C API, got none"),
    ],
    ids=["none", "old"],
)
def test_another_tensorflow_is_refused_by_the_function_it_lacks(operators, tmp_path: Path, functions, message: str):
    code = f"import ctypes; library = ctypes.CDLL({native.operators_path()!r})\n"
    code += "tell = library.paring_tensorflow_failure; tell.restype = ctypes.c_char_p; print(tell().decode())"
    if functions is not None:
        if (compiler := shutil.which(os.environ.get("CXX", "c++"))) is None:
            needs("native", "no C++ compiler")
        source, fake = tmp_path / "fake.cc", tmp_path / "libtensorflow_framework.so.2"
        source.write_text("\n".join(f'extern "C" void {name}() {{}}' for name in functions))
        subprocess.run([compiler, "-shared", "-fPIC", f"-Wl,-soname,{fake.name}", source, "-o", fake], check=True)
        code = f"import ctypes; ctypes.CDLL({str(fake)!r})\n" + code
    done = python(code)
    assert done.returncode == 0 and message in done.stdout and message in done.stderr
