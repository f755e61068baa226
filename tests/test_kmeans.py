"""k-means of rows, and clustering with it."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paring.compress import Cluster, Context
from paring.compress.kmeans import kmeans, nearest, seeds, settle
from paring.errors import InputError

FINITE = st.floats(-1e4, 1e4, width=32)
ROWS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40), elements=FINITE)


def inertia(rows: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The square error of each row, by comparing with every center."""
    return np.square(rows[:, :, None].astype(np.float64) - centers[:, None, :]).min(axis=2).sum(axis=1)


@given(ROWS, st.integers(2, 12), st.integers(0, 100))
@settings(deadline=None, max_examples=60)
def test_lloyd_steps_never_make_it_worse_and_end_better_than_the_seeds(rows, clusters, seed):
    ordered, counts = np.sort(rows, axis=1), np.full(len(rows), rows.shape[1])
    centers = seeds(ordered, counts, clusters, np.random.default_rng(seed))
    assert np.isin(centers, rows).all()
    tolerance = 1e-5 * (1 + np.abs(rows).max()) ** 2 * rows.shape[1]
    before = inertia(rows, centers)
    for rounds in (1, 2, 3, 8, 300):
        after = inertia(rows, settle(ordered, counts, centers, rounds))
        assert (after <= before + tolerance).all()
        before = after


@given(ROWS, st.integers(2, 12))
@settings(deadline=None, max_examples=60)
def test_each_value_gets_its_nearest_center_and_each_center_is_the_mean_of_its_values(rows, clusters):
    centers = kmeans(rows, np.ones(rows.shape, bool), clusters, np.random.default_rng(0))
    assert (np.diff(centers, axis=1) >= 0).all()
    found = nearest(rows, centers)
    least = np.abs(rows[:, :, None].astype(np.float64) - centers[:, None, :]).min(axis=2)
    np.testing.assert_allclose(np.abs(rows.astype(np.float64) - found), least, atol=1e-3)
    for line, own, chosen in zip(rows, centers, found, strict=True):
        for center in np.unique(own):
            if (members := line[chosen == center]).size:
                assert abs(members.mean(dtype=np.float64) - center) <= 1e-5 * (1 + np.abs(line).max())


@given(ROWS, st.integers(2, 12))
@settings(deadline=None, max_examples=60)
def test_as_few_values_as_clusters_stay_what_they_are(rows, clusters):
    few = np.unique(rows)[:clusters]
    rows = few[np.abs(rows[:, :, None] - few).argmin(axis=2)]
    assert np.array_equal(Cluster(clusters).encode(rows, Context("few", 0)).values, rows)


def test_a_center_without_values_moves_to_where_it_helps():
    row = np.array([[0.0, 1.0, 10.0, 11.0, 20.0, 21.0]], np.float32)
    centers = settle(row, np.array([6]), np.array([[5.0, 500.0, 501.0]], np.float32))
    assert centers.tolist() == [[0.5, 10.5, 20.5]]


@given(
    hnp.arrays(np.float32, st.sampled_from([(6, 20), (4, 3, 3, 5), (1, 3, 3, 8)]), elements=st.floats(-5, 5, width=32)),
    st.integers(2, 9), st.sampled_from([0, -1]), st.sampled_from(["channel", "tensor"]), st.integers(0, 3),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_clusters_hold_few_values_in_every_channel_and_keep_zeros(weight, clusters, axis, granularity, seed):
    axis %= weight.ndim
    zeros = np.random.default_rng(seed).random(weight.shape) < 0.5
    weight = np.where(zeros | (np.abs(weight) < 1e-3), 0, weight).astype(np.float32)
    found = Cluster(clusters, granularity).encode(weight, Context("layer", axis, pruned=True)).values
    assert found.shape == weight.shape
    assert ((found == 0) >= (weight == 0)).all()
    rows = (
        np.moveaxis(found, axis, 0).reshape(weight.shape[axis], -1)
        if granularity == "channel"
        else found.reshape(1, -1)
    )
    assert max(len(np.unique(row)) for row in rows) <= clusters


def test_zeros_by_accident_are_values_like_others():
    weight = np.array([[0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0, 13.0]], np.float32)
    assert Cluster(2).encode(weight, Context("layer", 0)).values.tolist() == [[1.5] * 4 + [11.5] * 4]


def test_a_large_layer_takes_seconds():
    weight = np.random.default_rng(0).standard_normal((2048, 2048), np.float32)
    start = time.process_time()
    Cluster(16).encode(weight, Context("large", 0))
    assert time.process_time() - start < 20  # 1 s on a quiet machine


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"clusters": 1}, "2 to 256, got 1"),
        ({"clusters": 257}, "2 to 256, got 257"),
        ({"clusters": 4.0}, "got 4.0"),
        ({"granularity": "row"}, "channel, tensor"),
        ({"seed": -1}, "cluster.seed"),
        ({"start": -1}, "cluster.start"),
        ({"start": 0.5}, "a whole number of steps, got 0.5"),
        ({"start": 2, "unit": "fraction"}, "0 to 1, got 2"),
    ],
)
def test_settings_that_are_wrong_are_refused(said, words):
    with pytest.raises(InputError, match=words):
        Cluster(**said)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(InputError, match="expected finite values"):
        Cluster(2).encode(np.array([[1.0, np.inf]], np.float32), Context("layer", 0))
