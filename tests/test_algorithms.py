"""The algorithms in training form, with the operations of Keras on TensorFlow; `check_algorithm` runs them on all backends."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import need_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paring.compress import Algorithm, Cluster, Context, LowRank, Quantize, Sparsify, chain
from paring.compress.mask import choose
from paring.compress.pattern import Pattern
from paring.compress.straight import fake_quant, lsq
from paring.errors import InputError

EVER = np.float32(np.inf)
quickly = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="session")
def ops(tensorflow: ModuleType) -> Any:
    """The operations that algorithms are given, here of the TensorFlow backend."""
    keras = need_module("tensorflow", "keras", "Keras is not installed; `pip install keras`")
    if keras.config.backend() != "tensorflow":
        pytest.skip("needs the TensorFlow backend of Keras")
    return keras.ops


def weight_of(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal((shape[0], 1)))).astype(np.float32)


def layer(taps: int = 1) -> Context:
    return Context("layer", 0, (1,), taps=taps)


class Training:
    """One weight, an algorithm's variables and how they go on."""

    def __init__(self, ops: Any, algorithm: Algorithm, weight: np.ndarray, context: Context) -> None:
        self.ops, self.algorithm, self.weight, self.context = ops, algorithm, weight, context
        self.variables = {n: ops.convert_to_tensor(e.value) for n, e in algorithm.variables(weight, context).items()}

    def step(self, step: float) -> dict[str, Any]:
        new = self.algorithm.update(
            self.ops, self.ops.convert_to_tensor(self.weight), self.variables, np.float32(step), self.context
        )
        self.variables |= new
        return new

    def shown(self, step: float = EVER) -> np.ndarray:
        weight = self.ops.convert_to_tensor(self.weight)
        return np.array(self.algorithm.project(self.ops, weight, self.variables, np.float32(step), self.context))

    def gradients(self, tensorflow: ModuleType, upstream: np.ndarray, step: float = EVER) -> dict[str, np.ndarray]:
        watched = {"": tensorflow.constant(self.weight)} | self.variables
        with tensorflow.GradientTape() as tape:
            tape.watch(list(watched.values()))
            own = {name: value for name, value in watched.items() if name}
            shown = self.algorithm.project(self.ops, watched[""], own, np.float32(step), self.context)
            loss = tensorflow.reduce_sum(shown * upstream)
        found = tape.gradient(loss, watched, unconnected_gradients="zero")
        return {name: np.array(tensorflow.convert_to_tensor(g)) for name, g in found.items()}


# -- masks -------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from(["unstructured", "2x1", "4x2", "3x5", "16x1"]), st.integers(1, 20), st.integers(1, 4), st.integers(1, 9),
    st.floats(0, 1, width=32), st.integers(0, 5),
)  # fmt: skip
@quickly
def test_masks_are_those_of_the_pattern(ops, name, outputs, taps, inputs, share, seed):
    pattern, weight = Pattern.parse(name), weight_of((outputs, taps * inputs), seed)
    alive = np.random.default_rng(seed).random(weight.shape) < 0.8
    found = np.array(
        choose(ops, pattern, ops.convert_to_tensor(weight), ops.cast(alive, "float32"), np.float32(share), taps)
    )
    assert set(np.unique(found)) <= {0.0, 1.0} and not (found.astype(bool) & ~alive).any()
    cut = (1, outputs, taps, inputs)
    wanted = pattern.kept(np.square(weight.reshape(cut)), alive.reshape(cut), share).reshape(weight.shape)
    if not np.array_equal(found, wanted):  # two shares may be equally near
        misses = [abs((1 - mask).sum() - share * weight.size) for mask in (found, wanted)]
        assert misses[0] == pytest.approx(misses[1], abs=1e-3)
        assert (found.astype(bool) & ~wanted).sum() == 0 or (wanted & ~found.astype(bool)).sum() == 0


@given(st.sampled_from(["2:4", "1:4", "3:5"]), st.integers(5, 13), st.integers(1, 3), st.floats(0, 1, width=32))
@quickly
def test_a_growing_share_of_sets_obeys_n_of_m(ops, name, inputs, taps, done):
    pattern, weight = Pattern.parse(name), weight_of((6, taps * inputs))
    ones = ops.ones(weight.shape)
    found = np.array(
        choose(ops, pattern, ops.convert_to_tensor(weight), ones, np.float32(done * pattern.sparsity), taps)
    )
    most, _ = pattern.crowded(np.ones((1, 6, taps, inputs), bool))
    over, _ = pattern.crowded(found.reshape(1, 6, taps, inputs) > 0)
    assert abs((most - over) - done * most) <= 0.51
    whole = pattern.kept(np.square(weight.reshape(1, 6, taps, inputs)), np.ones((1, 6, taps, inputs), bool), 0.0)
    assert (found >= whole.reshape(found.shape)).all()  # nothing goes that the pattern would keep


def test_pruning_grows_by_the_cubic_schedule_and_only_every_few_steps(ops):
    one = Training(ops, Sparsify(0.8, schedule="polynomial", start=4, end=24, every=5), weight_of((8, 50)), layer())
    shares, masks = [], []
    for step in range(30):
        one.step(step)
        masks.append(np.array(one.variables["mask"]))
        shares.append(1 - masks[-1].mean())
    wanted = [0.8 * (1 - (1 - min(max(0, (s - 4) // 5 * 5), 20) / 20) ** 3) if s >= 4 else 0.0 for s in range(30)]
    np.testing.assert_allclose(shares, wanted, atol=0.5 / 400 + 1e-6)
    assert all((after <= before).all() for before, after in pairwise(masks))
    assert (one.shown() == 0).mean() == pytest.approx(0.8)
    assert one.algorithm.promises(one.shown(), one.context) == ()


def test_a_schedule_that_is_found_late_catches_up(ops):
    one = Training(ops, Sparsify(0.6, schedule="cosine", end=100, every=7), weight_of((8, 50)), layer())
    one.step(1003)
    assert 1 - np.array(one.variables["mask"]).mean() == pytest.approx(0.6)


def test_masked_weights_get_no_gradient_and_are_held_at_zero(ops, tensorflow):
    one = Training(ops, Sparsify(0.5), weight_of((4, 6)), layer())
    mask = np.array(one.variables["mask"])
    upstream = np.ones((4, 6), np.float32)
    assert np.array_equal(one.gradients(tensorflow, upstream)[""], mask)
    held = one.algorithm.hold(ops, ops.convert_to_tensor(one.weight), one.variables, one.context)
    assert np.array_equal(np.array(held), one.weight * mask)


def test_a_weight_that_was_pruned_stays_pruned(ops):
    weight = weight_of((8, 40))
    weight[:, ::2] = 0
    one = Training(ops, Sparsify(0.75, schedule="polynomial", end=4, every=1), weight, layer())
    for step in range(6):
        one.weight = weight + 0.5  # as if the optimizer had moved all
        one.step(step)
    mask = np.array(one.variables["mask"])
    assert not mask[:, ::2].any() and 1 - mask.mean() == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("pattern", "shape", "taps", "nearest"),
    [
        ("16x4", (8, 10), 1, "8x4"), ("4x1", (2, 10), 1, "2x1"), ("1x8", (4, 27), 9, "1x3"), ("2:4", (8, 3), 1, "1:2"),
        ("2:4", (8, 9), 9, "unstructured"), ("3:8", (8, 4), 1, "unstructured"), ("4x1", (1, 9), 9, "unstructured"),
    ],
)  # fmt: skip
def test_a_pattern_that_a_layer_cannot_hold_is_refused_with_the_nearest(pattern, shape, taps, nearest):
    own = None if ":" in pattern else 0.5
    with pytest.raises(
        InputError, match=f"cannot prune in pattern {pattern} for layer.*The nearest that fits is {nearest}"
    ):
        Sparsify(own, pattern).variables(weight_of(shape), layer(taps))
    if nearest != "unstructured":
        Sparsify(None if ":" in nearest else 0.5, nearest).variables(weight_of(shape), layer(taps))


def test_schedules_become_steps_or_say_what_is_missing():
    in_epochs = Sparsify(0.5, schedule="polynomial", start=1, end=3.5, unit="epochs").resolved(100, None)
    assert (in_epochs.start, in_epochs.end, in_epochs.unit) == (100, 350, "steps")
    share = Sparsify(0.5, schedule="cosine", end=0.5, unit="fraction").resolved(100, 4)
    assert (share.start, share.end) == (0, 200)
    both = chain(share, Cluster(4, start=0.75, unit="fraction")).resolved(10, 4)
    assert both.stages[1].start == 30
    with pytest.raises(
        InputError, match=r"cannot place a schedule for sparsify.end.*Pass steps_per_epoch=\.\.\. to `attach`"
    ):
        Sparsify(0.5, schedule="polynomial", end=2, unit="epochs").resolved(None, 3)
    with pytest.raises(InputError, match=r"Pass steps_per_epoch=\.\.\. and epochs=\.\.\. to"):
        Cluster(4, start=0.5, unit="fraction").resolved(None, None)
    with pytest.raises(InputError, match="expected steps, got epochs"):
        Sparsify(0.5, schedule="polynomial", end=2, unit="epochs").variables(weight_of((4, 4)), layer())


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"schedule": "linear"}, "constant, polynomial, cosine"),
        ({"schedule": "polynomial"}, r"an end behind the start \(0\), got None"),
        ({"schedule": "cosine", "start": 5, "end": 5}, "an end behind the start"),
        ({"end": 5}, "sparsify.end.*take schedule polynomial"),
        ({"every": 0}, "sparsify.every"),
        ({"initial": 0.5}, "0 or more, below 0.5"),
        ({"start": 1.5, "unit": "fraction"}, "0 to 1, got 1.5"),
        ({"unit": "minutes"}, "steps, epochs, fraction"),
    ],
)
def test_schedules_that_are_wrong_are_refused(said, words):
    with pytest.raises(InputError, match=words):
        Sparsify(0.5, **said)


def test_settings_of_the_schedule_change_nothing_outside_training():
    weight = weight_of((8, 20))
    plain, gradual = Sparsify(0.5), Sparsify(0.5, schedule="cosine", start=3, end=9, every=2, initial=0.25)
    assert np.array_equal(plain.encode(weight, layer()).values, gradual.encode(weight, layer()).values)


@pytest.mark.parametrize("allocation", ["global", "erk"])
@pytest.mark.parametrize("pattern", ["", "2x2"])
def test_budgets_over_a_group_meet_the_share_of_all_its_weights(allocation, pattern):
    weights = [weight_of((64, 100), 1), 3 * weight_of((16, 18), 2), weight_of((32, 9), 3)]
    contexts = [layer(), layer(9), layer()]
    own = Sparsify(0.75, pattern, allocation=allocation).allocate(weights, contexts)
    zeros = sum(one.share * w.size for one, w in zip(own, weights, strict=True))
    assert zeros / sum(w.size for w in weights) == pytest.approx(0.75, abs=0.002)
    if allocation == "global" and not pattern:
        masks = [one.variables(w, c)["mask"].value for one, w, c in zip(own, weights, contexts, strict=True)]
        largest_gone = max(np.abs(w)[m == 0].max() for w, m in zip(weights, masks, strict=True))
        least_left = min(np.abs(w)[m == 1].min() for w, m in zip(weights, masks, strict=True))
        assert largest_gone < least_left * 1.02
    if allocation == "erk":
        assert own[0].share > own[2].share


@pytest.mark.parametrize(("gradual", "words"), [({}, "got none"), ({"start": 5}, "got a gradual schedule")])
def test_a_budget_by_error_needs_data_and_all_zeros_at_once(gradual, words):
    with pytest.raises(InputError, match=words + ".*take allocation global, erk or uniform"):
        Sparsify(0.5, allocation="error", **gradual).allocate([weight_of((4, 4))], [layer()])


# -- centers -----------------------------------------------------------------------------------------------------------


def test_layers_see_the_nearest_center_with_the_gradient_to_both(ops, tensorflow):
    one = Training(ops, Cluster(3), weight_of((5, 24)), layer())
    shown, upstream = one.shown(), weight_of((5, 24), 1)
    assert np.array_equal(shown, Cluster(3).encode(one.weight, one.context).values)
    found = one.gradients(tensorflow, upstream)
    assert np.array_equal(found[""], upstream)
    for row in range(5):
        for number, center in enumerate(np.array(one.variables["centroids"])[row]):
            members = shown[row] == center
            assert found["shift"][row, number] == pytest.approx(upstream[row][members].mean(), rel=1e-4)


def test_zeros_are_a_cluster_of_their_own_that_nothing_moves(ops, tensorflow):
    weight = weight_of((5, 24)) * (np.arange(24) % 2).astype(np.float32)
    one = Training(ops, Cluster(4), weight, layer())
    assert one.variables["centroids"].shape == (5, 3)
    assert ((one.shown() == 0) == (weight == 0)).all()
    assert not one.gradients(tensorflow, np.ones((5, 24), np.float32))[""][weight == 0].any()
    assert one.algorithm.promises(one.shown(), one.context) == ()


def test_before_the_start_centers_follow_and_layers_see_the_weights(ops):
    one = Training(ops, Cluster(6, start=10), weight_of((4, 60)), layer())
    one.weight = weight_of((4, 60), 5)  # training has moved on

    def error() -> float:
        return float(np.square(one.shown() - one.weight).sum())

    assert np.array_equal(one.shown(step=9), one.weight)
    errors = [error()]
    for step in range(10):
        one.step(step)
        errors.append(error())
    assert all(after <= before * 1.0001 for before, after in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]
    settled = np.array(one.variables["centroids"])
    one.step(10)
    assert np.array_equal(np.array(one.variables["centroids"]), settled)
    assert not np.array_equal(one.shown(step=10), one.weight)


def test_centers_that_pruning_left_empty_are_used_again(ops):
    weight = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    one = Training(ops, Cluster(9, start=50), weight, Context("layer", 0, pruned=True))
    one.weight = np.where(np.abs(weight) < 0.7, 0, weight).astype(np.float32)
    assert len(np.unique(one.shown())) < 7
    for step in range(50):
        one.step(step)
    assert len(np.unique(one.shown())) == 9


# -- grids -------------------------------------------------------------------------------------------------------------


@given(
    st.sampled_from([("int8", "channel"), ("int4", "channel"), ("int8", "tensor"), ("int4", "block"), ("float16", "channel")]),
    st.sampled_from(["range", "lsq"]), st.floats(-9, 4), st.integers(0, 1000), st.floats(-2, 2, width=32),
)  # fmt: skip
@quickly
def test_a_file_holds_exactly_what_training_shows(ops, kind, steps, size, seed, stretch):
    weights, granularity = kind
    quantize = Quantize(weights, "float", granularity, 32 if granularity == "block" else 0, steps=steps)
    weight = (weight_of((3, 64), seed) * 10**size).astype(np.float32)
    weight[0, :3] = 0
    one = Training(ops, quantize, weight, layer())
    if "stretch" in one.variables:
        one.variables["stretch"] += stretch
    shown = one.shown()
    for how in ("minmax", "mse"):
        encoded = Quantize(weights, "float", granularity, quantize.block_size, range=how).encode(shown, one.context)
        assert np.array_equal(quantize.decode(encoded), shown)
    assert quantize.promises(shown, one.context) == ()
    if steps == "range" and granularity != "block" and weights != "float16":
        peak = np.abs(weight).max(axis=1 if granularity == "channel" else None, keepdims=True)
        high = 127 if weights == "int8" else 7
        assert (np.abs(shown - weight) <= np.maximum(peak, 5e-7) / high * 0.502).all()


def test_learned_step_sizes_have_the_gradients_of_the_paper(ops, tensorflow):
    x = tensorflow.constant([-9.0, -0.6, 0.2, 0.95, 1.4])
    scale = tensorflow.Variable(0.5)
    with tensorflow.GradientTape() as tape:
        tape.watch(x)
        found = lsq(ops, x, scale, -7.0, 7.0, strength=0.1)
        loss = tensorflow.reduce_sum(found)
    dx, ds = tape.gradient(loss, [x, scale])
    assert np.array(found).tolist() == [-3.5, -0.5, 0.0, 1.0, 1.5]
    assert np.array(dx).tolist() == [0, 1, 1, 1, 1]
    # Of the paper's equation 3: round(v/s) - v/s inside, the end's code outside.
    assert float(ds) == pytest.approx(0.1 * (-7 + (-1 + 1.2) + (0 - 0.4) + (2 - 1.9) + (3 - 2.8)), rel=1e-5)


def test_a_learned_step_size_moves_to_less_error(ops, tensorflow):
    one = Training(ops, Quantize("int4", "float", steps="lsq"), weight_of((4, 256)), layer())
    one.variables["stretch"] -= 0.7  # far too small: it clips
    before = np.square(one.shown() - one.weight).sum()
    for _ in range(60):
        slope = one.gradients(tensorflow, 2 * (one.shown() - one.weight))["stretch"]
        one.variables["stretch"] -= 0.02 * np.sign(slope)
    assert np.square(one.shown() - one.weight).sum() < 0.6 * before


@given(st.floats(-20, 0, width=32), st.floats(0.125, 20, width=32), st.sampled_from([8, 16]), st.booleans())
@quickly
def test_activations_lie_on_the_grid_of_an_integer_kernel(ops, low, high, bits, symmetric):
    x = np.concatenate([np.linspace(1.5 * low - 1, 1.5 * high + 1, 301), [0.0]]).astype(np.float32)
    found = np.array(fake_quant(ops, ops.convert_to_tensor(x), np.float32(low), np.float32(high), bits, symmetric))
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    scale = np.float32(max(-low, high) if symmetric else high - low) / np.float32(top)
    zero = 0 if symmetric else int(np.floor(-low / scale + 0.5))
    codes = np.rint(found / scale)
    assert np.array_equal(found, codes.astype(np.float32) * scale)
    least, most = (-top - 1, top) if symmetric else (-zero, top - zero)
    assert least <= codes.min() and codes.max() <= most
    assert found[-1] == 0
    inside = (x >= least * scale) & (x <= most * scale)
    assert (np.abs(found - x)[inside] <= 0.5001 * scale + 1e-6 * np.abs(x[inside])).all()


def test_the_range_of_an_activation_gets_the_gradient_of_what_it_clips(ops, tensorflow):
    x = tensorflow.constant([-3.0, -0.5, 0.5, 4.0, 5.0])
    low, high = tensorflow.Variable(-1.0), tensorflow.Variable(2.0)
    with tensorflow.GradientTape() as tape:
        tape.watch(x)
        loss = tensorflow.reduce_sum(fake_quant(ops, x, low, high, 8, False))
    found = [np.array(g).tolist() for g in tape.gradient(loss, [x, low, high])]
    assert found == [[0, 1, 1, 0, 0], 1.0, 2.0]


# -- together ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["", "2x2", "2:4"])
def test_a_chain_keeps_every_promise_to_the_end(ops, pattern):
    prune = Sparsify(None if ":" in pattern else 0.5, pattern, schedule="polynomial", end=12, every=3)
    whole = chain(prune, Cluster(6, start=16), Quantize("int8", "float"))
    one = Training(ops, whole, weight_of((8, 72)), layer(9))
    rng = np.random.default_rng(0)
    for step in range(20):
        one.step(step)
        one.weight = np.array(whole.hold(ops, ops.convert_to_tensor(one.weight), one.variables, one.context))
        one.weight += 0.01 * rng.standard_normal(one.weight.shape).astype(np.float32) * (one.weight != 0)
    shown = one.shown()
    assert whole.promises(shown, one.context) == ()
    assert (shown == 0).mean() >= 0.5 and max(len(np.unique(row)) for row in shown) <= 6
    encoded = Quantize("int8", "float").encode(shown, one.context)
    assert max(len(np.unique(row)) for row in encoded.values) <= 6


def test_what_is_given_up_is_said(ops):
    after = chain(Sparsify(0.5), LowRank(rank=2))
    shown = Training(ops, after, weight_of((6, 20)), layer()).shown()
    (said,) = after.promises(shown, layer())
    assert said.startswith("Sparsify: 0.0 % zeros")
    assert "zeros" not in after.makes and "rank" in after.makes


def test_behind_a_decomposition_the_factors_are_quantized_not_their_product(ops, tensorflow):
    whole = chain(LowRank(rank=3), Quantize("int8", "float", steps="lsq"))
    one = Training(ops, whole, weight_of((8, 40)), layer())
    assert {"0.left", "0.right", "1.left.scale", "1.right.stretch"} <= set(one.variables)
    left, right = (np.array(f) for f in whole.factors(ops, one.weight, one.variables, EVER, one.context))
    assert left.shape == (8, 3) and right.shape == (3, 40)
    assert whole.stages[1].promises(left, layer()) == whole.stages[1].promises(right, layer()) == ()
    np.testing.assert_allclose(one.shown(), left @ right, rtol=1e-5, atol=1e-6)
    found = one.gradients(tensorflow, weight_of((8, 40), 1))
    assert not found[""].any() and all(found[name].any() for name in ("0.left", "0.right", "1.left.stretch"))
    encoded = chain(LowRank(rank=3), Quantize("int8", "float")).encode(one.weight, layer())
    assert Quantize("int8").promises(encoded.factors[0], layer()) == ()


def test_of_all_matrices_of_a_rank_the_nearest_is_found():
    weight = weight_of((12, 30))
    values = np.linalg.svd(weight, compute_uv=False)
    for rank in (1, 5, 12, 40):
        found = LowRank(rank=rank).encode(weight, layer())
        assert np.square(found.values - weight).sum() == pytest.approx(
            np.square(values[rank:]).sum(), rel=1e-3, abs=1e-3
        )
    share = np.cumsum(np.square(values)) / np.square(values).sum()
    factors = LowRank(energy=0.9).encode(weight, layer()).factors
    assert factors[0].shape[1] == int((share < 0.9).sum()) + 1
    with pytest.raises(InputError, match="either rank or energy"):
        LowRank()


def test_only_algorithms_can_be_chained():
    with pytest.raises(InputError, match="expected algorithms, got 'int8'"):
        chain(Sparsify(0.5), "int8")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least one"):
        chain()
    assert len(chain(chain(Sparsify(0.5), Cluster(4)), Quantize()).stages) == 3
