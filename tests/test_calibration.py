"""Statistics do not depend on the order of samples, take bounded memory, and are the model's own extremes."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from paring import optimize
from paring.calibrate import calibrate
from paring.calibration import HISTOGRAM, MOMENTS, RANGE, Statistics, TensorStatistics
from paring.data import feeds
from paring.demo import load_digits, model_path
from paring.errors import InputError
from paring.formats import load
from paring.formats.tflite.view import view
from paring.plan import plan
from paring.recipe import Recipe
from paring.solve import requests

ALL = {RANGE, HISTOGRAM, MOMENTS}
BUCKET = 2.0**-7
"""Relative resolution of the histogram: seven bits of mantissa."""

# Squares are summed in float32, where those of smaller values vanish.
values = st.floats(-1e6, 1e6, width=32).map(lambda value: value if abs(value) > 1e-12 else 0.0)
samples = st.lists(arrays.arrays(np.float32, (3, 2), elements=values), min_size=1, max_size=6)
few = settings(max_examples=40, deadline=None)


def collected(arrays: list[np.ndarray], wanted: set[str] = ALL) -> TensorStatistics:
    found = TensorStatistics.for_requests(wanted)
    for array in arrays:
        found.update(array, wanted)
    return found


def assert_same(a: TensorStatistics, b: TensorStatistics) -> None:
    assert (a.low, a.high, a.count) == (b.low, b.high, b.count)
    assert np.array_equal(a.histogram, b.histogram)
    for part in ("mean_sum", "square_sum"):
        x, y = getattr(a, part), getattr(b, part)
        assert (x is None) == (y is None)
        if x is not None:
            # Sums of doubles differ in their last bits by order; cancellation makes that relative to what was added.
            assert np.allclose(x, y, rtol=1e-9, atol=1e-9 * np.sqrt(a.square_sum.max() * a.count))


# -- one tensor ------------------------------------------------------------------------------------------------------


@few
@given(samples, st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter(given, random):
    shuffled = list(given)
    random.shuffle(shuffled)
    assert_same(collected(given), collected(shuffled))


@few
@given(samples, st.integers(0, 6))
def test_merged_statistics_are_those_of_all_samples(given, cut):
    a, b = given[:cut], given[cut:]
    merged = collected(a).merge(collected(b))
    if a and b:
        assert_same(merged, collected(given))
    assert (merged.low, merged.high, merged.count) == (collected(given).low, collected(given).high, 6 * len(given))


@few
@given(samples)
def test_range_and_moments_are_those_of_the_values(given):
    found, every = collected(given), np.concatenate(given).astype(np.float64)
    assert (found.low, found.high) == (every.min(), every.max())
    size = max(1e-30, np.abs(every).max())
    assert np.allclose(found.moments.mean, every.mean(axis=0), rtol=1e-5, atol=1e-6 * size)
    assert np.allclose(found.moments.second, np.square(every).mean(axis=0), rtol=1e-5, atol=1e-6 * size**2)


def test_the_size_of_the_state_does_not_depend_on_the_number_of_samples():
    def state(count: int) -> int:
        found = collected([np.full((50, 8), i, np.float32) for i in range(count)])
        parts = [getattr(found, f.name) for f in fields(found)]
        return sum(p.nbytes for p in parts if isinstance(p, np.ndarray))

    assert state(1) == state(100) == 65536 * 8 + 2 * 8 * 8


def test_only_what_is_wanted_is_kept():
    found = collected([np.ones((2, 3), np.float32)], {RANGE})
    assert found.histogram is None
    assert found.moments is None
    assert collected([np.ones((2, 3), np.float32)], {HISTOGRAM}).moments is None


def test_an_empty_array_changes_nothing():
    found = collected([np.ones((2, 3), np.float32), np.zeros((0, 3), np.float32)])
    assert (found.low, found.high, found.count) == (1.0, 1.0, 6)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_value_that_is_not_a_number_is_never_lost(place):
    arrays = [np.ones((1, 2), np.float32) for _ in range(3)]
    arrays[place][0, 1] = np.nan
    assert np.isnan(collected(arrays).low)
    assert np.isnan(collected(arrays[:1]).merge(collected(arrays[1:])).high)


def test_moments_of_a_vector_are_those_of_its_values():
    found = collected([np.array([1.0, 3.0], np.float32), np.array([3.0, 5.0], np.float32)])
    assert found.moments.mean.tolist() == [2.0, 4.0]
    assert found.moments.second.tolist() == [5.0, 17.0]


def test_channel_db_is_the_median_channels_signal_to_the_rounding_noise_of_one_grid():
    quiet = collected([np.array([[1.0, 1.0, 1.0, 1000.0]], np.float32)])
    assert quiet.channel_db(255) == pytest.approx(10 * np.log10(1 / ((1000 / 255) ** 2 / 12)))
    assert collected([np.ones((1, 4), np.float32)]).channel_db(255) > 50
    assert collected([np.zeros((1, 4), np.float32)]).channel_db(255) is None
    assert collected([np.ones((1, 4), np.float32)], {RANGE}).channel_db(255) is None


# -- ranges from histograms, against brute force on the values -------------------------------------------------------

DRAWS = {
    "normal": lambda rng: rng.normal(0, 1, 4000),
    "shifted": lambda rng: rng.normal(3, 1, 4000),
    "relu": lambda rng: np.maximum(rng.normal(0, 1, 4000), 0),
    "long tail": lambda rng: rng.standard_t(2, 4000) * 100,
    "tiny": lambda rng: rng.normal(0, 1e-6, 4000),
    "one outlier": lambda rng: np.append(rng.uniform(0, 1, 4000), 50.0),
}


def draw(kind: str, seed: int = 0) -> np.ndarray:
    return DRAWS[kind](np.random.default_rng(seed)).astype(np.float32)


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("percentile", [99.99, 99.0, 90.0])
def test_a_percentile_is_that_of_the_values_to_the_buckets_resolution(kind, percentile):
    x = draw(kind)
    low, high = collected([x]).range("percentile", percentile)
    ordered = np.sort(x).astype(np.float64)
    for got, share in ((low, 1 - percentile / 100), (high, percentile / 100)):
        wanted = ordered[min(int(np.ceil(share * x.size)), x.size) - 1 if share * x.size > 1 else 0]
        assert got == pytest.approx(wanted, rel=BUCKET, abs=1e-30)
    assert x.min() <= low
    assert high <= x.max()


def brute_force(x: np.ndarray, levels: int) -> tuple[float, float, float]:
    """Over the same candidates, the range with the least clipping and rounding error on the values themselves."""
    x = x.astype(np.float64)
    shrink = np.linspace(1.0, 0.2, 81)
    best = (np.inf, 0.0, 0.0)
    for low in min(x.min(), 0.0) * shrink if x.min() < 0 else [0.0]:
        below = np.square(np.minimum(x - low, 0)).sum()
        for high in max(x.max(), 0.0) * shrink if x.max() > 0 else [0.0]:
            best = min(best, (expected_error(x, low, high, levels, below), low, high))
    return best


def expected_error(x: np.ndarray, low: float, high: float, levels: int, below: float | None = None) -> float:
    below = np.square(np.minimum(x - low, 0)).sum() if below is None else below
    return below + np.square(np.maximum(x - high, 0)).sum() + (x != 0).sum() * ((high - low) / (levels - 1)) ** 2 / 12


@pytest.mark.parametrize("kind", DRAWS)
@pytest.mark.parametrize("levels", [256, 16])
def test_the_mse_range_loses_as_little_as_brute_force_on_the_values(kind, levels):
    x = draw(kind)[::4]
    least, _, _ = brute_force(x, levels)
    low, high = collected([x]).range("mse", levels=levels)
    assert expected_error(x.astype(np.float64), low, high, levels) <= least * (1 + 4 * BUCKET)
    assert least <= expected_error(x.astype(np.float64), min(float(x.min()), 0.0), float(x.max()), levels)


def test_mse_cuts_an_outlier_off_where_that_pays():
    x = np.append(np.random.default_rng(0).uniform(0, 1, 10**6), 50.0).astype(np.float32)
    assert collected([x]).range("mse", levels=256)[1] < 50
    assert collected([x]).range("minmax")[1] == 50


def test_a_histogram_tells_magnitudes_of_any_size_apart():
    x = np.array([0.0, -0.0, 1e-38, 1e-20, 1.0, 1e20, 3e38, -1e-20, -3e38], np.float32)
    found = collected([np.repeat(x, 100)], {RANGE, HISTOGRAM})
    low, high = found.range("percentile", 60)
    assert found.histogram.sum() == 900
    assert (low, high) == (pytest.approx(0.0, abs=1e-30), pytest.approx(1e-20, rel=BUCKET))


@pytest.mark.parametrize("how", ["minmax", "percentile", "mse"])
def test_a_constant_tensor_has_its_value_as_range(how):
    assert collected([np.full(10, 3.0, np.float32)]).range(how) == (3.0, 3.0)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def statistics() -> Statistics:
    rng = np.random.default_rng(0)
    full = collected([rng.normal(size=(4, 3)).astype(np.float32)])
    return Statistics(
        {(0, 3): full, (1, 2): collected([np.ones(2, np.float32)], {RANGE})}, {(0, 3): "a;b", (1, 2): "ü"}, 4
    )


def test_saved_statistics_read_back(tmp_path, statistics):
    statistics.save(tmp_path / "kept.npz")
    got = Statistics.load(tmp_path / "kept.npz")
    assert got.names == statistics.names
    assert got.samples == 4
    for key, wanted in statistics.tensors.items():
        for part in fields(wanted):
            assert np.array_equal(getattr(got.tensors[key], part.name), getattr(wanted, part.name)), part.name


def test_no_statistics_at_all_read_back(tmp_path):
    Statistics({}, {}).save(tmp_path / "kept.npz")
    assert Statistics.load(tmp_path / "kept.npz") == Statistics({}, {})


def corrupted(path, how: str) -> None:
    content = path.read_bytes()
    if how == "absent":
        path.unlink()
    elif how == "an .npy file":
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    elif how == "pickled":
        np.savez(path, ids=np.array([object()], dtype=object))
    elif how == "other arrays":
        np.savez(path, x=np.zeros(3))
    elif how == "a short histogram":
        with np.load(path) as data:
            np.savez(path, **{**data, "histogram.0": np.zeros(3, np.int64)})
    elif how == "names missing":
        with np.load(path) as data:
            np.savez(path, **{**data, "names": data["names"][:1]})
    else:
        path.write_bytes(
            {"empty": b"", "text": b"hello", "cut": content[:-300], "half": content[: len(content) // 2]}[how]
        )


@pytest.mark.parametrize(
    "how",
    [
        "absent",
        "empty",
        "text",
        "cut",
        "half",
        "an .npy file",
        "pickled",
        "other arrays",
        "a short histogram",
        "names missing",
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, statistics, how):
    path = tmp_path / "kept.npz"
    statistics.save(path)
    corrupted(path, how)
    with pytest.raises(InputError) as error:
        Statistics.load(path)
    assert error.value.exit_code == 2
    assert "kept" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_place_that_cannot_be_written_is_said(tmp_path, statistics):
    with pytest.raises(InputError, match=r"cannot write the statistics for .*absent"):
        statistics.save(tmp_path / "absent" / "kept.npz")


# -- a model ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load(model_path())


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return load_digits()[0][:12]


@pytest.fixture(scope="module")
def calibrated(model, images):
    graph = view(model)
    wanted = requests(plan(graph, Recipe.named("int8")))
    return wanted, calibrate(model, graph, wanted, feeds(model, images))


def test_ranges_are_minimum_and_maximum_of_the_interpreters_tensors(calibrated, images):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    wanted, found = calibrated
    assert wanted
    builtin = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(
        str(model_path()), experimental_preserve_all_tensors=True, experimental_op_resolver_type=builtin
    )
    interpreter.allocate_tensors()
    seen: dict[int, list[np.ndarray]] = {index: [] for _, index in wanted}
    for image in images:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image[None])
        interpreter.invoke()
        for index, values in seen.items():
            values.append(interpreter.get_tensor(index))
    assert found.samples == len(images)
    for index, values in seen.items():
        got, every = found.tensors[0, index], np.concatenate(values)
        assert (got.low, got.high) == pytest.approx((every.min(), every.max()), rel=1e-5, abs=1e-5)
        if MOMENTS in wanted[0, index]:
            assert got.moments.mean == pytest.approx(
                every.reshape(-1, every.shape[-1]).mean(axis=0), rel=1e-3, abs=1e-4
            )


def test_a_generator_as_data_gives_what_its_array_does(model, images, calibrated):
    wanted, found = calibrated
    got = calibrate(model, view(model), wanted, feeds(model, (image[None] for image in images)))
    assert got.samples == found.samples
    for key, statistics in found.tensors.items():
        assert (got.tensors[key].low, got.tensors[key].high) == (statistics.low, statistics.high)


def test_progress_counts_samples(model, images):
    done: list[int] = []
    optimize(model_path(), "int8", images, limit=3, verified=False, progress=done.append)
    assert done == [1, 2, 3]


@pytest.mark.parametrize("data", [np.zeros((0, 32, 32, 1), np.float32), [], iter(())])
def test_no_samples_are_an_error(data):
    with pytest.raises(InputError, match="no samples"):
        optimize(model_path(), "int8", data, verified=False)


def test_statistics_of_another_model_are_refused(calibrated):
    _, found = calibrated
    renamed = Statistics(found.tensors, {key: f"other/{name}" for key, name in found.names.items()})
    absent = Statistics({(7, 7): TensorStatistics(0.0, 1.0, 1)}, {(7, 7): "x"})
    for wrong in (renamed, absent):
        with pytest.raises(InputError, match="the statistics are of another model for tensor "):
            optimize(model_path(), "int8", statistics=wrong, verified=False)


def test_statistics_without_histograms_do_not_pass_for_a_recipe_that_needs_them(calibrated):
    _, found = calibrated
    with pytest.raises(InputError, match=r"the statistics keep too little for tensor .*expected a histogram"):
        optimize(model_path(), Recipe.named("int8").with_settings(range="mse"), statistics=found, verified=False)


def test_statistics_that_miss_a_tensor_name_it(calibrated):
    _, found = calibrated
    key = next(
        k for k, parts in requests(plan(view(load(model_path())), Recipe.named("int8"))).items() if RANGE in parts
    )
    fewer = Statistics({k: v for k, v in found.tensors.items() if k != key}, found.names)
    with pytest.raises(InputError, match="no calibration statistics for tensor"):
        optimize(model_path(), "int8", statistics=fewer, verified=False)
