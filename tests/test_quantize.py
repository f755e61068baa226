"""Weights onto grids: error bounds, exact zeros, packing, channels, chunks, and the bias that goes with them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from graphs import CONV, DENSE, Sketch, weight
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from paring.calibration import Statistics, TensorStatistics
from paring.compress import weights as chunks
from paring.compress.base import Context, Moments, per_input
from paring.compress.encodings import FORMS, decode, from_bfloat16, pack_int4, to_bfloat16, unpack_int4
from paring.compress.quantize import Quantize
from paring.compress.weights import encode
from paring.errors import InputError
from paring.graph import Quantization, WeightUse
from paring.plan import plan
from paring.recipe import Recipe, Rule
from paring.solve import solve

BLOCKS = Quantize("int4", "dynamic", "block", 32)
FORM_SETTINGS = [
    Quantize("int8"),
    Quantize("int4"),
    Quantize("int8", granularity="tensor"),
    Quantize("int4", granularity="tensor"),
    BLOCKS,
    replace(BLOCKS, range="mse"),
    Quantize("int8", range="mse"),
    Quantize("int4", range="mse"),
]
CONTEXT = Context("layer", axis=0, reduced=(1,))
finite = st.floats(-4e5, 4e5, width=32)
matrices = arrays.arrays(np.float32, st.tuples(st.integers(1, 5), st.sampled_from([32, 64, 96])), elements=finite)
few = settings(max_examples=40, deadline=None)


def scales(grid: Quantization, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each element."""
    return decode(np.ones(shape, np.int8), replace(grid, zero_point=np.zeros_like(grid.zero_point)))


# -- what encoding promises ------------------------------------------------------------------------------------------


@few
@given(matrices, st.sampled_from([s for s in FORM_SETTINGS if s.range == "minmax"]))
def test_min_max_errs_by_at_most_half_a_step(w, chosen):
    encoded = chosen.encode(w, CONTEXT)
    step = scales(encoded.grid, w.shape)
    # Block scales are stored as float16, so the largest value may lie outside by 2**-11 of itself.
    slack = np.abs(w) * 2.0**-11 if chosen.block_size else 1e-6 * np.abs(w)
    assert (np.abs(w - chosen.decode(encoded)) <= step / 2 * (1 + 1e-6) + slack).all()


@few
@given(matrices, st.sampled_from(FORM_SETTINGS), st.integers(0, 2**32 - 1))
def test_zeros_stay_exactly_zero_and_codes_within_the_form(w, chosen, seed):
    w[np.random.default_rng(seed).random(w.shape) < 0.5] = 0
    encoded = chosen.encode(w, CONTEXT)
    form = FORMS[chosen.weights]
    assert (encoded.values[w == 0] == 0).all()
    assert encoded.values.min() >= form.low
    assert encoded.values.max() <= form.high
    assert (encoded.grid.scale > 0).all()
    assert np.isfinite(encoded.grid.scale).all()


@few
@given(matrices, st.sampled_from([s for s in FORM_SETTINGS if s.range == "mse"]))
def test_mse_never_loses_more_than_min_max(w, chosen):
    def loss(settings: Quantize) -> np.ndarray:
        error = settings.decode(settings.encode(w, CONTEXT)).astype(np.float64) - w
        return np.square(error).reshape(len(w), -1, chosen.block_size or w.shape[1]).sum(axis=2)

    # float16 block scales are rounded after the search.
    assert (
        loss(chosen) <= loss(replace(chosen, range="minmax")) * (1.01 if chosen.block_size else 1 + 1e-5) + 1e-9
    ).all()


@few
@given(arrays.arrays(np.int8, st.integers(0, 41), elements=st.integers(-8, 7)))
def test_packed_int4_unpacks_to_the_same_codes(codes):
    packed = pack_int4(codes)
    assert packed.size == (codes.size + 1) // 2
    assert np.array_equal(unpack_int4(packed, codes.size), codes)


@pytest.mark.parametrize("name", [n for n in FORMS if n not in ("float16", "bfloat16")])
def test_every_storage_form_unpacks_what_it_packs(name):
    form = FORMS[name]
    codes = np.array([form.low, -1, 0, 1, form.high], form.dtype if form.bits > 4 else np.int8)
    raw = form.pack(codes)
    assert raw.nbytes == -(-codes.size * form.bits // 8)
    assert np.array_equal(form.unpack(raw, codes.size), codes)


def test_bfloat16_is_the_upper_half_of_the_bits():
    values = np.array([0.0, -1.0, 0.1, 3e38, -1e-9], np.float32)
    form, codes = FORMS["bfloat16"], to_bfloat16(values)
    raw = form.pack(codes)
    assert raw.nbytes == 2 * codes.size and np.array_equal(form.unpack(raw, codes.size), codes)
    np.testing.assert_allclose(from_bfloat16(codes), values, rtol=2**-8)


def test_float16_keeps_what_it_can_and_clips_the_rest():
    chosen = Quantize("float16", "float")
    got = chosen.decode(chosen.encode(np.array([0.0, 0.1, 1e6, -1e6, 1e-9], np.float32), CONTEXT))
    assert got.tolist() == [0.0, float(np.float16(0.1)), 65504.0, -65504.0, 0.0]


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("chosen", FORM_SETTINGS)
def test_weights_that_are_not_finite_are_refused(bad, chosen):
    w = np.zeros((2, 32), np.float32)
    w[1, 3] = bad
    with pytest.raises(InputError, match="finite values"):
        chosen.encode(w, CONTEXT)


def test_weights_whose_block_scale_no_float16_holds_are_refused():
    with pytest.raises(
        InputError, match=r"in blocks: expected values within 458528, got 1e\+06\. Take one scale per channel"
    ):
        BLOCKS.encode(np.full((1, 32), 1e6, np.float32), CONTEXT)


@pytest.mark.parametrize("chosen", FORM_SETTINGS)
def test_weights_that_are_all_zero_have_a_grid(chosen):
    encoded = chosen.encode(np.zeros((2, 64), np.float32), CONTEXT)
    assert (encoded.grid.scale > 0).all()
    assert not encoded.values.any()


# -- channels --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [((6, 4), 0), ((6, 3, 3, 4), 0), ((1, 3, 3, 6), 3), ((4, 6), 1), ((5, 6, 4), 1)]
)
def test_each_channel_has_its_own_scale_wherever_its_axis_is(shape, axis):
    size = np.arange(1, 7, dtype=np.float32)
    w = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    along = [-1 if d == axis else 1 for d in range(len(shape))]
    w = np.sign(w) * size.reshape(along)
    encoded = Quantize("int8").encode(w, Context("layer", axis))
    assert encoded.grid.axis == axis
    assert encoded.grid.scale == pytest.approx(size / 127)
    assert np.array_equal(np.abs(encoded.values), np.full(shape, 127))
    assert Quantize("int8").decode(encoded) == pytest.approx(w)


def test_one_scale_for_the_tensor_where_asked_or_where_there_is_no_axis():
    w = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    for encoded in (Quantize(granularity="tensor").encode(w, CONTEXT), Quantize().encode(w, Context("layer", None))):
        assert encoded.grid.scale.shape == (1,)
        assert encoded.grid.axis is None
        assert encoded.values.tolist() == [[32, 64], [95, 127]]


def test_blocks_have_one_scale_each():
    w = np.repeat(np.array([[1.0, 2.0], [4.0, 8.0]], np.float32), 32, axis=1)
    encoded = BLOCKS.encode(w, CONTEXT)
    assert encoded.grid.scale == pytest.approx(np.array([[1, 2], [4, 8]]) / 7, rel=1e-3)
    assert (encoded.values == 7).all()
    assert np.array_equal(encoded.grid.scale, encoded.grid.scale.astype(np.float16))


@pytest.mark.parametrize(
    ("values", "shape", "axis", "reduced", "wanted"),
    [
        ([1, 2], (3, 2), 0, (1,), [[1, 2]] * 3),
        ([1, 2], (3, 1, 1, 2), 0, (1, 2, 3), [[[[1, 2]]]] * 3),
        ([1, 2], (2, 3), None, (-2,), [[1, 1, 1], [2, 2, 2]]),
        ([1, 2], (1, 1, 1, 2), 3, (0, 1, 2), [[[[1, 2]]]]),
        ([1, 2], (1, 1, 1, 4), 3, (0, 1, 2), [[[[1, 1, 2, 2]]]]),
        ([1, 2], (1, 1, 2, 2), 3, (0, 1, 2), [[[[1, 2], [1, 2]]]]),
        ([1, 2, 3, 4], (2, 1, 1, 2), 0, (1, 2, 3), [[[[1, 2]]], [[[3, 4]]]]),
        ([1, 2], (4, 1, 1, 1), 0, (1, 2, 3), [[[[1]]], [[[1]]], [[[2]]], [[[2]]]]),
    ],
    ids=["dense", "conv", "matmul", "depthwise", "multiplier 2", "wide as deep", "grouped", "one per group"],
)  # fmt: skip
def test_each_weight_knows_the_input_it_meets(values, shape, axis, reduced, wanted):
    got = per_input(np.array(values, float), shape, axis, reduced)
    assert np.array_equal(np.broadcast_to(got, shape), np.array(wanted, float))


def test_a_layout_that_does_not_say_how_gives_none():
    assert per_input(np.ones(3), (4, 2), 0, (1,)) is None
    assert per_input(np.ones(3), (1, 2, 2, 4), 3, (0, 1, 2)) is None
    assert per_input(np.ones(3), (4, 2), 0, ()) is None


# -- weights that lie on a grid already ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("axis", [0, None])
def test_a_kept_grid_reproduces_its_codes(name, axis):
    rng = np.random.default_rng(0)
    form = FORMS[name]
    codes = rng.integers(form.low - 1, form.high + 1, (7, 32)).astype(np.int8)
    scale = rng.uniform(1e-5, 10, 7 if axis == 0 else 1).astype(np.float32)
    grid = Quantization(scale, np.zeros(scale.size, np.int64), name, axis)
    for how in ("minmax", "mse"):
        encoded = Quantize(name, range=how).encode(decode(codes, grid), replace(CONTEXT, grid=grid))
        assert np.array_equal(encoded.values, codes)
        assert encoded.grid.same_grid(grid)


@pytest.mark.parametrize(
    "grid",
    [
        Quantization(np.ones(1, np.float32), np.array([3]), "int8"),
        Quantization(np.ones(32, np.float32), np.zeros(32, np.int64), "int8", 1),
        Quantization(np.ones(1, np.float32), np.zeros(1, np.int64), "int4"),
    ],
    ids=["zero point", "another axis", "another type"],
)
def test_a_grid_that_the_kernels_cannot_take_is_not_kept(grid):
    w = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    encoded = Quantize().encode(w, replace(CONTEXT, grid=grid))
    assert encoded.grid.same_grid(Quantize().encode(w, CONTEXT).grid)


# -- encoding in chunks ----------------------------------------------------------------------------------------------


def whole_and_chunked(monkeypatch, chosen: Quantize, w: np.ndarray, context: Context):
    monkeypatch.setattr(chunks, "CHUNK", 3 * w[0].size)
    return chosen.encode(w, context), encode(chosen, weight(w), context)


def assert_same(a, b):
    assert a.form == b.form
    assert a.values.dtype == b.values.dtype
    assert np.array_equal(a.values, b.values)
    assert (a.grid is None and b.grid is None) or a.grid.same_grid(b.grid)


@pytest.mark.parametrize("chosen", [*FORM_SETTINGS, Quantize("float16", "float")])
def test_row_chunks_encode_as_one_piece(monkeypatch, chosen):
    w = np.random.default_rng(0).normal(0, 1, (10, 64)).astype(np.float32)
    assert_same(*whole_and_chunked(monkeypatch, chosen, w, CONTEXT))


@pytest.mark.parametrize("axis", [0, None])
def test_row_chunks_keep_a_grid(monkeypatch, axis):
    rng = np.random.default_rng(0)
    scale = rng.uniform(0.1, 1, 10 if axis == 0 else 1).astype(np.float32)
    grid = Quantization(scale, np.zeros(scale.size, np.int64), "int8", axis)
    w = decode(rng.integers(-127, 128, (10, 64)).astype(np.int8), grid)
    assert_same(*whole_and_chunked(monkeypatch, Quantize(), w, replace(CONTEXT, grid=grid)))


@pytest.mark.parametrize(("shape", "inputs"), [((10, 1, 1, 8), 8), ((10, 1, 1, 4), 8)], ids=["conv", "grouped"])
def test_row_chunks_weigh_their_own_inputs(monkeypatch, shape, inputs):
    rng = np.random.default_rng(0)
    w = rng.normal(0, 1, shape).astype(np.float32)
    mean = rng.uniform(0, 5, inputs)
    context = Context("layer", 0, (1, 2, 3), Moments(mean, mean**2 + rng.uniform(0, 5, inputs)))
    assert_same(*whole_and_chunked(monkeypatch, Quantize("int4", range="mse"), w, context))


# -- solved biases ---------------------------------------------------------------------------------------------------


def layer(
    native: str,
    w: np.ndarray,
    bias: np.ndarray,
    mean: np.ndarray,
    chosen: Quantize,
    params: dict | None = None,
    high: float = 10.0,
):
    """The solved edit of one layer whose input has the mean `mean` and the range [0, `high`]."""
    net = Sketch()
    x = net.tensor("x", (1, mean.size))
    kinds = {"FULLY_CONNECTED": "dense", "CONV_2D": "conv2d", "TRANSPOSE_CONV": "conv2d_transpose"}
    reduced = tuple(range(1, w.ndim))
    demands = replace(DENSE if w.ndim == 2 else CONV, weights=(WeightUse(1, 0, reduced, bias=2),))
    inputs = [x, net.tensor("w", w.shape, weight=weight(w)), net.tensor("b", bias.shape, weight=weight(bias))]
    y = net.op("layer", native, inputs, demands, kind=kinds[native])
    net.ops[0] = replace(net.ops[0], params=params or {})
    graph = net.finish([x], [y])
    ranges = {
        x: TensorStatistics(0.0, high, 4 * mean.size, None, 4 * mean, 4 * (mean**2 + 1)),
        y: TensorStatistics(-1.0, 1.0, 4),
    }
    made = plan(graph, Recipe((Rule((chosen,)),)))
    return solve(made, Statistics(ranges, {})).edits[0]


def dense_layer(seed: int = 0):
    rng = np.random.default_rng(seed)
    w, b = rng.normal(0, 1, (6, 64)).astype(np.float32), rng.normal(0, 1, 6).astype(np.float32)
    return w, b, rng.uniform(0, 3, 64)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_corrected_bias_makes_up_for_the_mean_of_what_rounding_lost(granularity):
    w, b, mean = dense_layer()
    edit = layer("FULLY_CONNECTED", w, b, mean, Quantize("int4", granularity=granularity, bias_correction=True))
    stored = edit.inputs[1].encoded
    lost = (w - decode(stored.values, stored.grid)).astype(np.float64) @ mean
    assert np.abs(lost).max() > 0.1
    assert edit.inputs[2].encoded.values == pytest.approx(b + lost, rel=1e-5)


def test_without_correction_a_dynamic_layer_keeps_its_bias():
    w, b, mean = dense_layer()
    assert set(layer("FULLY_CONNECTED", w, b, mean, Quantize("int4")).inputs) == {1}


def test_a_transposed_convolution_meets_each_position_of_its_kernel_once_per_stride():
    rng = np.random.default_rng(0)
    w, b, mean = rng.normal(0, 1, (6, 4, 4, 16)).astype(np.float32), np.zeros(6, np.float32), rng.uniform(0, 3, 16)
    edit = layer("TRANSPOSE_CONV", w, b, mean, Quantize("int4", bias_correction=True), {"stride_h": 2, "stride_w": 2})
    stored = edit.inputs[1].encoded
    lost = ((w - decode(stored.values, stored.grid)).astype(np.float64) * mean).sum(axis=(1, 2, 3))
    assert edit.inputs[2].encoded.values == pytest.approx(lost / 4, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("activations", "form", "kind"), [("int8", "int32", np.int32), ("int16", "int64", np.int64)])
def test_a_static_bias_lies_on_the_product_of_the_scales(activations, form, kind):
    w, b, mean = dense_layer()
    edit = layer("FULLY_CONNECTED", w, b, mean, Quantize(activations=activations))
    port, source, stored = edit.inputs[2], edit.inputs[0].grid, edit.inputs[1].encoded
    assert port.encoded.form == form
    assert port.encoded.values.dtype == kind
    assert port.grid.scale == pytest.approx(source.scale * stored.grid.scale)
    error = np.abs(port.encoded.values * port.grid.scale.astype(np.float64) - b)
    assert (error <= port.grid.scale * 0.501).all()


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_a_bias_that_would_overflow_gets_coarser_weights(granularity):
    w, b, mean = dense_layer()
    w[2] *= 1e-9
    b[2] = 1000.0
    if granularity == "tensor":
        w *= 1e-9
    edit = layer("FULLY_CONNECTED", w, b, mean, Quantize(activations="int8", granularity=granularity))
    bias, stored, source = edit.inputs[2], edit.inputs[1].encoded, edit.inputs[0].grid
    assert np.abs(bias.encoded.values.astype(np.int64)).max() <= 2**30
    assert bias.grid.scale == pytest.approx(source.scale * stored.grid.scale)
    assert bias.encoded.values[2] * float(bias.grid.scale[2 if granularity == "channel" else 0]) == pytest.approx(
        1000.0, rel=1e-6
    )
    step = scales(stored.grid, w.shape)
    assert (np.abs(decode(stored.values, stored.grid) - w) <= step * 1.01).all()
    if granularity == "channel":
        plain = Quantize().encode(w, CONTEXT)
        others = [0, 1, 3, 4, 5]
        assert np.array_equal(stored.values[others], plain.values[others])
        assert stored.grid.scale[2] > plain.grid.scale[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused_not_written_into_a_bias(bad):
    w, b, mean = dense_layer()
    mean[3] = bad
    with pytest.raises(InputError, match="layer layer: expected finite inputs"):
        layer("FULLY_CONNECTED", w, b, mean, Quantize("int4", bias_correction=True))


def test_a_layers_name_is_in_the_error_for_its_weights():
    w, b, mean = dense_layer()
    w[0, 0] = np.nan
    with pytest.raises(InputError, match=r"cannot quantize weights.* for layer layer"):
        layer("FULLY_CONNECTED", w, b, mean, Quantize())
