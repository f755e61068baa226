"""Metrics against closed forms, and models scored by them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from models import Net

from paring import InputError, load
from paring.data import feeds
from paring.demo import load_digits, model_path
from paring.errors import MetricError
from paring.measure import evaluate as room
from paring.measure.evaluate import Kept, evaluate
from paring.measure.metrics import METRICS, default_metric, find_metric
from paring.runtime import RunError

NAN = float("nan")
SCORES = np.array([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3], [0.2, 0.2, 0.6], [0.4, 0.4, 0.2]])


@pytest.fixture
def user(tmp_path, monkeypatch):
    """Writes `own.py`, a module of the user's in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])

    def write(text: str) -> None:
        Path("own.py").write_text(text, encoding="utf-8")

    return write


# -- closed forms ----------------------------------------------------------------------------------------------------


def test_top1_is_the_share_of_right_answers_in_points():
    score, values = find_metric("top1").measure(SCORES, np.array([1, 0, 1, 0]))
    assert score == 75.0
    assert values.tolist() == [100, 100, 0, 100]
    assert METRICS["top1"].unit == "points"


def test_of_equal_scores_the_first_counts_as_argmax_has_it():
    assert find_metric("top1").score(SCORES[3:], np.array([1])) == 0.0
    assert find_metric("top1").score(SCORES[3:], np.array([0])) == 100.0


def test_top5_takes_any_of_the_five_largest():
    scores = np.tile(np.arange(8.0), (8, 1))
    assert find_metric("top5").values(scores, np.arange(8)).tolist() == [0, 0, 0, 100, 100, 100, 100, 100]


def test_an_answer_that_is_not_a_number_is_never_right():
    scores = np.array([[NAN, 1.0], [1.0, NAN], [NAN, NAN]])
    assert find_metric("top1").score(scores, np.array([0, 0, 0])) == 0.0


def test_labels_of_pixels_count_by_sample():
    scores = np.zeros((2, 2, 1, 3))
    scores[..., 1] = 1
    labels = np.array([[[1], [1]], [[1], [0]]])
    assert find_metric("top1").values(scores, labels).tolist() == [100, 50]


def test_labels_in_a_column_serve():
    assert find_metric("top1").score(SCORES, np.array([[1], [0], [1], [0]])) == 75.0


def test_mse_and_cosine_against_the_first_model_and_against_labels():
    outputs, reference = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[1.0, 1.0], [0.0, 1.0]])
    assert find_metric("mse").values(outputs, None, reference).tolist() == [0.5, 0.5]
    np.testing.assert_allclose(find_metric("cosine").values(outputs, None, reference), [0.5**0.5, 1.0])
    assert (
        find_metric("mse").score(outputs, outputs + 1, reference) == 1.0
    )  # labels of the output's size are the target
    assert find_metric("mse").score(outputs, np.array([0, 1]), reference) == 0.5  # class numbers are not


def test_cosine_of_nothing():
    zeros = np.zeros((1, 2))
    assert find_metric("cosine").score(zeros, None, zeros) == 1.0
    assert find_metric("cosine").score(zeros, None, np.ones((1, 2))) == 0.0


def test_auc_counts_pairs():
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8, 0.4]), np.array([0, 0, 1, 1, 1])
    pairs = [float(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    assert find_metric("auc").score(scores[:, None], labels) == pytest.approx(100 * np.mean(pairs))
    both = np.stack([1 - scores, scores], 1)
    assert find_metric("auc").score(both, labels) == pytest.approx(100 * np.mean(pairs))
    assert find_metric("auc").values(both, labels) is None


def test_auc_of_several_classes_is_the_mean_of_each_against_the_rest():
    labels = np.array([1, 0, 2, 0])
    single = [find_metric("auc").score(SCORES[:, c], (labels == c).astype(int)) for c in range(3)]
    assert find_metric("auc").score(SCORES, labels) == pytest.approx(np.mean(single))
    assert find_metric("auc").score(SCORES, np.eye(3)[labels]) == pytest.approx(np.mean(single))


def test_a_large_input_goes_block_by_block_with_the_same_result():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(2500, 10)), rng.integers(0, 10, 2500)
    assert find_metric("top1").score(scores, labels) == 100 * np.mean(scores.argmax(1) == labels)
    assert find_metric("mse").score(scores, None, scores * 0) == pytest.approx(np.square(scores).mean())


def test_drop_is_positive_where_it_got_worse():
    assert find_metric("top1").drop(90.0, 88.0) == 2.0
    assert find_metric("mse").drop(0.1, 0.3) == pytest.approx(0.2)


def test_default_is_top1_where_labels_are_classes():
    assert default_metric(SCORES, np.array([0, 1, 2, 0])).name == "top1"
    for labels in (None, np.zeros((4, 3)), np.array([0.5, 1, 1, 1]), np.array([0, 1, 2, 3])):
        assert default_metric(SCORES, labels).name == "mse"
    assert default_metric(SCORES[:, :1], np.array([0, 1, 1, 0])).name == "mse"


# -- functions of the user's -----------------------------------------------------------------------------------------


def test_a_function_from_the_working_folder(user):
    user("def right(outputs, labels):\n    return (outputs.argmax(1) == labels).mean()\n")
    metric = find_metric("own:right")
    assert metric.measure(SCORES, np.array([1, 0, 1, 0])) == (0.75, None)
    assert metric.higher_is_better


def test_a_function_may_give_one_value_per_sample_and_be_better_when_lower(user):
    user("def worst(outputs, labels):\n    return outputs.max(1)\nworst.lower_is_better = True\n")
    metric = find_metric("own:worst")
    assert metric.values(SCORES).tolist() == SCORES.max(1).tolist()
    assert not metric.higher_is_better


def test_several_outputs_come_as_a_dict(user):
    user("def count(outputs, labels):\n    return len(outputs['a']) + 10 * len(outputs)\n")
    assert find_metric("own:count").score({"a": SCORES, "b": SCORES}) == 24.0


def test_a_function_that_raises_shows_its_own_traceback_and_the_model(user):
    user("def bad(outputs, labels):\n    return helper(labels)\ndef helper(x):\n    return 1 / 0\n")
    with pytest.raises(
        MetricError, match=r"the metric failed for own:bad on small\.tflite: got ZeroDivisionError"
    ) as e:
        find_metric("own:bad").measure(SCORES, None, None, "small.tflite")
    assert "return helper(labels)" in e.value.detail
    assert "return 1 / 0" in e.value.detail
    assert "metrics.py" not in e.value.detail
    assert e.value.exit_code == 2


@pytest.mark.parametrize(("given", "got"), [("None", "NoneType"), ("'high'", "str"), ("[1, 2]", "an array of [2]")])
def test_a_function_that_gives_no_score(user, given, got):
    user(f"def odd(outputs, labels):\n    return {given}\n")
    with pytest.raises(MetricError, match="gives no score for own:odd: expected a number, or 4 of them") as e:
        find_metric("own:odd").score(SCORES)
    assert got in str(e.value)


# -- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "outputs", "labels", "message"),
    [
        ("top1", SCORES, None, "top1 needs labels. Give them with --labels"),
        ("top1", SCORES, np.array([0, 1, 2, 3]), "class numbers from 0 to 2, got 3"),
        ("top1", SCORES, np.array([0, 1, 2, 0.5]), "class numbers from 0 to 2, got 0.5"),
        ("top1", SCORES, np.array([0, 1]), "expected a label for each, got 2 labels for 4 outputs"),
        ("top1", SCORES, np.eye(4), "a class number for each row of"),
        ("top1", SCORES[:, :1], np.array([0, 1, 1, 0]), "For a yes or no take auc"),
        ("top5", SCORES, np.array([0, 1, 1, 0]), "more than 5 classes"),
        ("auc", SCORES, np.zeros(4), "expected labels of both kinds"),
        ("mse", SCORES, None, "nothing to compare with"),
    ],
)
def test_what_does_not_fit_is_said(name, outputs, labels, message):
    labels = np.zeros(4, int) if name == "auc" else labels
    outputs = SCORES[:, :1] if name == "auc" else outputs
    with pytest.raises(InputError, match=message):
        find_metric(name).score(outputs, labels)


@pytest.mark.parametrize("text", ["top-1", "accuracy", "no_such_module:f"])
def test_an_unknown_metric_names_what_there_is(text):
    with pytest.raises(InputError, match="no such"):
        find_metric(text)


# -- models ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled():
    _, images, labels = load_digits()
    return images[:100], labels[:100]


def test_a_model_is_scored_in_a_child(labelled):
    model = load(model_path())
    found = evaluate(model, feeds(model, labelled)[0])
    assert (found.metric.name, found.against, found.samples) == ("top1", "labels", 100)
    assert found.score == found.values.mean()
    assert found.score >= 95
    assert found.outputs["probabilities"].shape == (100, 10)
    assert found.drop(found) == (0.0, 0.0)


def test_integer_ends_are_read_as_real_numbers(labelled):
    from paring import optimize

    float_model = load(model_path())
    feed = feeds(float_model, labelled)[0]
    recipe = {"version": 1, "inputs": "int8", "outputs": "int8", "rules": [
        {"kind": "*", "apply": {"quantize": {"weights": "int8", "activations": "int8"}}}]}  # fmt: skip
    made = optimize(float_model, recipe, labelled[0][:20], verified=False).model
    before = evaluate(float_model, feed)
    after = evaluate(made, feed, find_metric("mse"), reference=before.outputs)
    assert after.against == "the first model"
    assert 0 < after.score < 0.01
    lost, error = before.drop(evaluate(made, feed))
    assert abs(lost) <= 5
    assert error is not None


def test_the_scored_output_can_be_named():
    net = Net()
    x = net.input((1, 4), name="x")
    net.outputs = [net.then("TANH", [x], (1, 4), name="tanh"), net.then("LOGISTIC", [x], (1, 4), name="logistic")]
    model = net.finish()
    feed = feeds(model, np.linspace(-1, 1, 40, dtype=np.float32).reshape(10, 4))[0]
    first = evaluate(model, feed)
    assert list(first.outputs) == ["tanh", "logistic"]
    assert first.score == 0.0
    np.testing.assert_allclose(first.outputs["tanh"].ravel(), np.tanh(np.linspace(-1, 1, 40)), atol=1e-5)
    assert list(evaluate(model, feed, output="logistic").outputs) == ["logistic", "tanh"]
    with pytest.raises(InputError, match="no such output for x: expected tanh, logistic"):
        evaluate(model, feed, output="x")


def test_a_batch_of_several_gives_a_row_for_each():
    net = Net()
    net.outputs = [net.then("TANH", [net.input((4, 3), name="x")], (4, 3), name="y")]
    model = net.finish()
    data = np.arange(24, dtype=np.float32).reshape(8, 3) / 24
    found = evaluate(model, feeds(model, (data, np.tanh(data)))[0])
    assert (found.samples, found.against, found.metric.name) == (8, "labels", "mse")
    assert found.score < 1e-9


def test_a_model_that_cannot_run_is_named():
    net = Net()
    x = net.input((1, 3), name="x")
    net.outputs = [net.tensor((1, 3))]
    net.op("TANH", [x], net.outputs, version=99)
    model = net.finish()
    with pytest.raises(RunError, match="cannot run the model for mine"):
        evaluate(model, feeds(model, np.zeros((2, 3), np.float32))[0], name="mine")


def test_large_outputs_are_mapped_from_a_file(monkeypatch):
    monkeypatch.setattr(room, "SPOOL", 100)
    kept, rows = Kept("y"), np.arange(60, dtype=np.float32).reshape(20, 3)
    for row in rows:
        kept.add(row[None], 1)
    assert isinstance(kept.array(), np.memmap)
    np.testing.assert_array_equal(kept.array(), rows)
    with pytest.raises(InputError, match="outputs differ in shape"):
        kept.add(np.zeros((1, 4)), 1)
