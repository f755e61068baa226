"""The search for a recipe: its arithmetic, its memory, its executors, and whole searches on a small model."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import need_module
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net

from paring import BoundError, InputError, Recipe, load
from paring.data import feeds
from paring.errors import MetricError
from paring.formats.tflite.view import view
from paring.measure.evaluate import evaluate
from paring.measure.metrics import find_metric
from paring.tuning import Tuned, tune
from paring.tuning.journal import Journal
from paring.tuning.limits import Limits
from paring.tuning.schemes import choices, patterns, schemes
from paring.tuning.search import Option, first_right, ladder, pareto, smaller
from paring.tuning.store import SampleFile, first, stored
from paring.tuning.trial import Outcome, run
from paring.tuning.tune import _Search as Search

# -- arithmetic ------------------------------------------------------------------------------------------------------

numbers = st.floats(0.01, 100)
layers = st.lists(
    st.lists(st.tuples(numbers, numbers), min_size=1, max_size=4, unique_by=lambda o: o[0]), min_size=1, max_size=4
)


@settings(max_examples=60, deadline=None)
@given(layers)
def test_no_mixture_is_cheaper_and_quieter_than_a_rung(found):
    options = {
        f"l{n}": [Option(f"s{i}", cost, noise) for i, (cost, noise) in enumerate(each)] for n, each in enumerate(found)
    }
    totals = []
    for allocation in ladder(options):
        chosen = [next(o for o in options[layer] if o.scheme == scheme) for layer, scheme in allocation]
        totals.append((sum(o.cost for o in chosen), sum(o.noise for o in chosen)))
    assert totals == sorted(totals)  # each rung costs more
    assert [noise for _, noise in totals] == sorted((noise for _, noise in totals), reverse=True)
    for mixture in itertools.product(*options.values()):
        cost, noise = sum(o.cost for o in mixture), sum(o.noise for o in mixture)
        assert not any(cost < a * (1 - 1e-9) and noise < b * (1 - 1e-9) for a, b in totals)
    assert totals[0][0] == pytest.approx(sum(min(o.cost for o in each) for each in options.values()))
    assert totals[-1][1] == pytest.approx(sum(min(o.noise for o in each) for each in options.values()))


def test_single_steps_back_save_bytes_and_change_one_layer():
    options = {"a": [Option("x", 1, 9), Option("y", 4, 1)], "b": [Option("x", 1, 2), Option("y", 8, 1)]}
    steps = smaller((("a", "y"), ("b", "y")), options)
    assert steps == [(("a", "y"), ("b", "x")), (("a", "x"), ("b", "y"))]  # 7 bytes for noise 1 before 3 for 8


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 5))
def test_the_first_right_index_is_found_with_few_questions(count, first, width):
    asked: list[int] = []

    def ask(places: list[int]) -> list[bool]:
        asked.extend(places)
        assert all(0 <= place < count for place in places)
        return [place >= first for place in places]

    assert first_right(count, ask, width) == (first if first < count else None)
    assert len(asked) <= width * (2 + int(np.log2(count + 1)))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_the_front_holds_what_nothing_beats(points):
    front = pareto(points)
    for point, kept in zip(points, front, strict=True):
        beaten = any(a <= point[0] and b <= point[1] and (a, b) != point for a, b in points)
        assert kept is not beaten


@pytest.mark.parametrize(
    ("drop", "size", "latency", "metric", "expected"),
    [
        ("0.5pt", "60kB", "3ms", "top1", (0.5, 60e3, 3.0)),
        ("1%", "1.5MiB", "800us", "top1", (0.8, 1.5 * 2**20, 0.8)),
        ("1 points", 1234, "0.002s", "auc", (1.0, 1234.0, 2.0)),
        ("0.01", None, None, "mse", (0.01, None, None)),
        ("-1pt", None, 5, "top1", (-1.0, None, 5.0)),
    ],
)
def test_bounds_are_read(drop, size, latency, metric, expected):
    found = Limits.parse(drop, size, latency, find_metric(metric), 80.0)
    assert (found.drop, found.size, found.latency) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "metric", "words"),
    [
        ({"drop": "1"}, "top1", ["--max-drop", "1pt", "1%"]),
        ({"drop": "1pt"}, "mse", ["--max-drop", "plain number"]),
        ({"drop": "lots"}, "top1", ["--max-drop", "0.5pt"]),
        ({"drop": "1.1.1pt"}, "top1", ["--max-drop"]),
        ({"size": "60 apples"}, "top1", ["--max-size", "60kB"]),
        ({"latency": "-3ms"}, "top1", ["--max-latency", "3ms"]),
    ],
)
def test_bounds_that_cannot_be_read_say_how_to_write_them(said, metric, words):
    given_ = {"drop": None, "size": None, "latency": None, **said}
    with pytest.raises(InputError) as error:
        Limits.parse(**given_, metric=find_metric(metric), score=80.0)
    assert all(word in str(error.value) for word in words)


def test_misses_add_up_and_a_failed_candidate_misses_everything():
    bounds, outcome = Limits(drop=1.0, size=10.0), Outcome(bytes=10, drop=0.8, spread=0.3)
    assert bounds.misses(outcome, None) == 0
    assert bounds.misses(outcome, None, drop=1.1) == pytest.approx(0.1)
    assert bounds.misses(Outcome(bytes=15, drop=2.0), None) == pytest.approx(1.5)
    assert bounds.misses(Outcome(failed="no"), None) == np.inf


def test_a_lucky_candidate_counts_as_its_like():
    """Ten models of the same noise lose 1 point on average; the one that lost nothing is not taken at its word."""
    search = Search.__new__(Search)
    search.outcomes = {(("a", str(n)),): Outcome(noise=0.01, drop=float(n % 3), spread=0.1) for n in range(9)}
    lucky = search.outcomes["a", "0"] = Outcome(noise=0.01, drop=0.0, spread=0.1)
    assert search.cautious(lucky) == pytest.approx(0.9 + 0.1)
    calm = Outcome(noise=1e-4, drop=0.2, spread=0.1)  # nothing like it was measured
    search.outcomes["b",] = calm
    assert search.cautious(calm) == pytest.approx(0.3)


def test_patterns_find_their_layer_alone():
    names = [
        "conv", "conv/x;bn/mul;bn/add", "conv/x2;y", "relu;a", "relu;b", "relu;a;c", "a.b(1);c", "a_b(1);c", "",
        "\N{SNOWMAN};[", "conv/x", "deep;relu;a",
    ]  # fmt: skip
    found = patterns(names)
    for name in names:
        assert [other for other in names if re.search(f"^(?:{found[name]})", other)] == [name]


# -- memory ----------------------------------------------------------------------------------------------------------


def test_a_journal_outlives_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.put({"recipe": {"a": 1}, "b": 2}, {"bytes": 5})
    journal.put({"recipe": {"a": 2}}, {"bytes": 6})
    path.write_text(path.read_text()[:-9])
    again = Journal(path)
    assert again.get({"b": 2, "recipe": {"a": 1}}) == {"bytes": 5}
    assert again.get({"recipe": {"a": 2}}) is None
    again.put({"recipe": {"a": 2}}, {"bytes": 7})
    assert Journal(path).get({"recipe": {"a": 2}}) == {"bytes": 7}


def test_values_belong_to_rows_or_to_samples(tmp_path):
    file = SampleFile(tmp_path / "some.samples", ("x",))
    for rows in (2, 1, 3):
        file.add([np.zeros((rows, 4), np.float32)])
    file.finish(np.arange(3))
    assert stored(file.path, 2).labels.tolist() == [0, 1]
    assert first(np.arange(6), file.path, 2).tolist() == [0, 1, 2]
    assert first(np.arange(3), file.path, None).tolist() == [0, 1, 2]
    file = SampleFile(tmp_path / "some.samples", ("x",))
    file.add([np.zeros((2, 4), np.float32)])
    file.finish(None)
    assert stored(file.path).labels is None, "those of an earlier run are gone"


def test_samples_come_back_with_their_labels(tmp_path):
    file = SampleFile(tmp_path / "some.samples", ("x", "y"))
    for number in range(3):
        file.add([np.full((2, 3), number, np.float32), np.array(number)])
    file.finish(np.arange(6))
    whole, head = stored(tmp_path / "some.samples"), stored(tmp_path / "some.samples", 2)
    assert [sample["x"][0, 0] for sample in whole] == [0, 1, 2]
    assert [int(sample["y"]) for sample in whole] == [0, 1, 2]
    assert whole.labels.tolist() == list(range(6))
    assert head.labels.tolist() == list(range(4))
    assert len(list(head)) == head.count == 2


# -- whole searches --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two dense layers that classify noisy directions, and labelled samples for them."""
    folder = tmp_path_factory.mktemp("tuning")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(6, 64)).astype(np.float32)
    labels = rng.integers(0, 6, 400)
    x = (centres[labels] + 1.3 * rng.normal(size=(400, 64))).astype(np.float32)
    net = Net()
    start = net.input((1, 64), name="x")
    dense = ("FullyConnectedOptions", {"fused_activation_function": 1})
    wide = rng.normal(size=(96, 64)).astype(np.float32) / 8
    bias = net.constant(np.zeros(96, np.float32))
    hidden = net.then("FULLY_CONNECTED", [start, net.constant(wide), bias], (1, 96), dense, "hidden")
    features = np.maximum(x @ wide.T, 0)
    head = np.linalg.lstsq(features, np.eye(6)[labels], rcond=None)[0].T.astype(np.float32)
    linear, none = ("FullyConnectedOptions", {}), net.constant(np.zeros(6, np.float32))
    net.outputs.append(net.then("FULLY_CONNECTED", [hidden, net.constant(head), none], (1, 6), linear, "head"))
    net.finish().save(folder / "float.tflite")
    np.savez(folder / "data.npz", x=x, labels=labels)
    return folder / "float.tflite", folder / "data.npz"


@pytest.fixture(scope="module")
def found(task: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, Path]:
    """One whole search."""
    out = tmp_path_factory.mktemp("found") / "small.tflite"
    with ThreadPoolExecutor(2) as executor:
        return tune(task[0], str(task[1]), output=out, max_drop="3pt", executor=executor, width=2), out


def test_the_smallest_within_the_bound_is_written_and_told(task, found):
    (tuned, out), told = found, found[0].tuning
    assert told.metric == "top1"
    assert told.samples == (100, 300)
    assert {s.layer for s in told.sensitivity} == {"hidden", "head"}
    by_scheme = {(s.layer, s.scheme): s.db for s in told.sensitivity}
    assert by_scheme["hidden", "int8"] > by_scheme["hidden", "int4"] + 10
    (chosen,) = (c for c in told.candidates if c.chosen)
    assert out.stat().st_size == chosen.bytes
    assert chosen.drop <= 3
    # What was told is what the file does on the measuring samples.
    with np.load(task[1]) as data:
        measured = np.arange(400) % 4 != 0
        feed = feeds(load(task[0]), (data["x"][measured], data["labels"][measured]))[0]
    assert evaluate(load(out), feed, find_metric("top1")).score == pytest.approx(chosen.score)
    assert evaluate(load(task[0]), feed, find_metric("top1")).score == pytest.approx(told.before.score)
    assert chosen.bytes < next(c.bytes for c in told.candidates if c.label == "all int8")
    assert all(c.latency_ms > 0 for c in told.candidates)
    assert Recipe.load(chosen.recipe).to_data() == tuned.recipe.to_data()
    assert not Path(f"{out}.tune").exists()


def test_within_a_size_the_best_is_taken(task, tmp_path):
    with ThreadPoolExecutor(2) as executor:
        tuned = tune(task[0], str(task[1]), output=tmp_path / "s.tflite", max_size="8kB", limit=160, executor=executor)
    assert (tmp_path / "s.tflite").stat().st_size <= 8000
    fitting = [c for c in tuned.tuning.candidates if c.bytes <= 8000]
    (chosen,) = (c for c in fitting if c.chosen)
    assert chosen.score == max(c.score for c in fitting)


def test_an_empty_front_names_the_nearest_miss_and_keeps_what_was_measured(task, tmp_path):
    out = tmp_path / "none.tflite"
    with ThreadPoolExecutor(2) as executor, pytest.raises(BoundError) as error:
        tune(task[0], str(task[1]), output=out, max_drop="3pt", max_size="1kB", executor=executor)
    said = str(error.value)
    assert "no candidate keeps the bounds" in said
    assert "nearest: " in said
    assert "bytes" in said
    assert "max_size 1000" in said
    assert not out.exists()
    assert Path(f"{out}.tune/journal.jsonl").exists()


class Stop:
    """Stops a search after some trials, as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def test_an_interrupted_search_goes_on_where_it_was(task, found, tmp_path):
    out = tmp_path / "resumed.tflite"
    with ThreadPoolExecutor(2) as executor:
        with pytest.raises(KeyboardInterrupt):
            tune(task[0], str(task[1]), output=out, max_drop="3pt", executor=executor, width=2, progress=Stop(9))
        assert not out.exists()
        kept = len(Path(f"{out}.tune/journal.jsonl").read_text().splitlines())
        assert kept == 9
        again = tune(task[0], str(task[1]), output=out, max_drop="3pt", executor=executor, width=2)
    assert again.tuning.reused == kept
    whole = next(c for c in found[0].tuning.candidates if c.label == "all int4")
    assert next(c for c in again.tuning.candidates if c.label == "all int4").score == whole.score


def test_other_data_makes_old_measurements_void(task, tmp_path):
    out, work = tmp_path / "other.tflite", tmp_path / "work"
    with np.load(task[1]) as data:
        x, labels = data["x"][:80], data["labels"][:80]
    with ThreadPoolExecutor(1) as executor:
        for shift, kept in ((0, 1), (0, 2), (1, 1)):
            with pytest.raises(KeyboardInterrupt):
                tune(
                    task[0], (x + shift, labels), output=out, max_drop="3pt", executor=executor, folder=work,
                    progress=Stop(kept),
                )  # fmt: skip
            assert len((work / "journal.jsonl").read_text().splitlines()) == kept


def test_another_metric_under_the_same_name_makes_them_void_too(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with np.load(task[1]) as data:
        x, labels = data["x"][:80], data["labels"][:80]
    for factor, kept in ((100, 1), (100, 2), (90, 1)):
        monkeypatch.delitem(sys.modules, "changing", raising=False)
        Path("changing.py").write_text(f"def rate(outputs, labels): return {factor}.0 * (outputs.argmax(-1) == labels)")
        importlib.invalidate_caches()
        with ThreadPoolExecutor(1) as executor, pytest.raises(KeyboardInterrupt):
            tune(
                task[0], (x, labels), output="out.tflite", metric="changing:rate", max_drop=3, executor=executor,
                folder="work", progress=Stop(kept),
            )  # fmt: skip
        assert len(Path("work/journal.jsonl").read_text().splitlines()) == kept


def test_a_folder_with_other_things_in_it_is_left_alone(task, tmp_path):
    (tmp_path / "float.tflite").write_text("precious")
    with pytest.raises(InputError, match=r"cannot keep measurements.*other files.*--work"):
        tune(task[0], str(task[1]), output=tmp_path / "out.tflite", max_drop="3pt", folder=tmp_path)
    with pytest.raises(InputError, match="cannot keep measurements"):
        tune(task[0], str(task[1]), output=tmp_path / "out.tflite", max_drop="3pt", folder=tmp_path / "float.tflite")
    assert [path.name for path in tmp_path.iterdir()] == ["float.tflite"]
    assert (tmp_path / "float.tflite").read_text() == "precious"


@pytest.mark.parametrize("activations", ["dynamic", "int8"])
def test_every_layer_gets_every_scheme_whatever_its_neighbours_take(activations, tmp_path):
    """Under one scheme for all, a CONCATENATION's operands take its grid; a layer alone in its scheme keeps its own."""
    rng, net = np.random.default_rng(0), Net()
    start = net.input((1, 32), name="x")
    linear = ("FullyConnectedOptions", {})

    def dense(source: int, rows: int, columns: int, name: str) -> int:
        weight = net.constant((rng.normal(size=(rows, columns)) / 6).astype(np.float32))
        return net.then("FULLY_CONNECTED", [source, weight, -1], (1, rows), linear, name)

    both = [dense(start, 24, 32, "left"), dense(start, 24, 32, "right")]
    net.outputs.append(
        dense(net.then("CONCATENATION", both, (1, 48), ("ConcatenationOptions", {"axis": 1})), 8, 48, "head")
    )
    data = rng.normal(size=(70, 32)).astype(np.float32)
    with ThreadPoolExecutor(2) as executor:
        found = tune(
            net.finish(), data, output=tmp_path / "m.tflite", max_drop=1.0, executor=executor, activations=activations
        )
    measured = {(s.layer, s.scheme) for s in found.tuning.sensitivity}
    assert measured >= set(itertools.product(("left", "right", "head"), ("int8", "int8-int16", "int4")))
    assert not any("cannot take" in note or "could not" in note for note in found.tuning.notes)


@pytest.mark.parametrize("per", ["row", "sample", "wrong"])
def test_labels_of_samples_with_several_rows(per, tmp_path):
    rng, net = np.random.default_rng(0), Net()
    start = net.input((2, 32), name="x")
    weight = net.constant(rng.normal(size=(10, 32)).astype(np.float32))
    net.outputs.append(net.then("FULLY_CONNECTED", [start, weight, -1], (2, 10), ("FullyConnectedOptions", {}), "head"))
    x = rng.normal(size=(300, 2, 32)).astype(np.float32)
    labels = {"row": rng.integers(0, 10, 600), "sample": rng.normal(size=(300, 3)), "wrong": np.zeros(450, int)}[per]
    drop = "100%" if per == "row" else 1.0
    common = {"output": tmp_path / "m.tflite", "max_drop": drop, "labels": labels, "rounding": "nearest"}
    with ThreadPoolExecutor(2) as executor:
        if per == "wrong":
            with pytest.raises(InputError, match="labels do not match"):
                tune(net.finish(), list(x), executor=executor, **common)
            return
        found = tune(net.finish(), list(x), executor=executor, **common)
    assert found.tuning.metric == ("top1" if per == "row" else "mse")
    assert found.tuning.samples == (75, 225)


def test_a_metric_without_values_per_sample_may_choose_with_nothing_to_spare(task, tmp_path, monkeypatch):
    """The first trials lose nothing by luck, the others more than the bound: nothing says how sure that is."""
    (tmp_path / "single_metric.py").write_text(
        "def rate(outputs, labels):\n    return float(100 * (outputs.argmax(-1) == labels).mean())\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Search, "cautious", lambda self, outcome: None if outcome.drop is None else outcome.drop + 1e3)
    with ThreadPoolExecutor(2) as executor:
        found = tune(
            task[0],
            str(task[1]),
            output="m.tflite",
            metric="single_metric:rate",
            max_drop=60,
            limit=80,
            executor=executor,
        )
    assert any("models with as noisy an output lost more" in note for note in found.tuning.notes)


def test_a_metric_that_gives_no_number_is_no_way_to_choose(task, tmp_path, monkeypatch):
    (tmp_path / "hollow_metric.py").write_text(
        "import sys\ndef never(outputs, labels): return float('nan')\n"
        "def later(outputs, labels): return 1.0 if 'pytest' in sys.modules else float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"cannot tune.*a number from hollow_metric:never.*nan"):
        tune(task[0], str(task[1]), output="m.tflite", metric="hollow_metric:never", max_drop=1, limit=80)
    with pytest.raises(BoundError, match=r"no candidate could be made.*hollow_metric:later gives nan"):
        tune(task[0], str(task[1]), output="m.tflite", metric="hollow_metric:later", max_drop=1, limit=80)


def test_processes_by_default_and_a_metric_of_the_users(task, tmp_path, monkeypatch):
    (tmp_path / "loud_metric.py").write_text(
        "import numpy as np\nprint('loud')\n"
        "def right(outputs, labels):\n    print('louder')\n    return 100.0 * (outputs.argmax(-1) == labels)\n"
    )
    monkeypatch.chdir(tmp_path)
    found = tune(task[0], str(task[1]), output="m.tflite", metric="loud_metric:right", max_drop="60", limit=80)
    assert found.tuning.metric == "loud_metric:right"
    assert found.result.report.output_bytes == Path("m.tflite").stat().st_size


def test_a_metric_that_fails_ends_the_search_with_its_own_traceback(task, tmp_path, monkeypatch):
    (tmp_path / "broken_metric.py").write_text(
        "import sys\ndef rate(outputs, labels):\n    if 'pytest' not in sys.modules:\n"
        "        raise ZeroDivisionError('in a trial')\n    return 1.0\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MetricError, match="ZeroDivisionError") as error:
        tune(task[0], str(task[1]), output="m.tflite", metric="broken_metric:rate", max_drop="3", limit=80)
    assert "broken_metric.py" in error.value.detail


class Dying(Executor):
    """Workers that die under a trial, a number of times."""

    def __init__(self, deaths: int) -> None:
        self.deaths = deaths

    def submit(self, *call, **more):
        future: Future = Future()
        self.deaths -= 1
        if self.deaths >= 0:
            future.set_exception(RuntimeError("killed"))
        else:
            future.set_result(run(*call[1:], **more))
        return future


def test_a_trial_whose_worker_died_is_tried_again_but_not_for_ever(task, tmp_path):
    common = {"max_drop": "50pt", "limit": 70}
    with pytest.raises(Exception, match=r"worker died.*killed"):
        tune(task[0], str(task[1]), output=tmp_path / "a.tflite", executor=Dying(10**6), **common)
    found = tune(task[0], str(task[1]), output=tmp_path / "a.tflite", executor=Dying(2), **common)
    assert found.tuning.candidates


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ["nothing to tune for", "--max-drop"]),
        ({"max_drop": "1"}, ["--max-drop"]),
        ({"max_drop": "1pt", "activations": "int7"}, ["activations", "dynamic or int8"]),
        ({"max_drop": "1pt", "skip": ["FULLY_CONNECTED"]}, ["nothing to tune"]),
        ({"max_drop": "1pt", "metric": "top9"}, ["no such metric"]),
        ({"max_drop": "1pt", "skip": ["nothing_like_it"]}, ["matches no operator"]),
    ],
)
def test_bad_requests_are_one_clear_error(task, tmp_path, more, words):
    with pytest.raises(InputError) as error:
        tune(task[0], str(task[1]), output=tmp_path / "bad.tflite", **more)
    assert all(word in str(error.value) for word in words)
    assert not list(tmp_path.iterdir())


def test_schemes_too_slow_for_the_bound_are_left_out():
    search = Search.__new__(Search)
    search.bounds, search.latencies, measured = Limits(drop=1.0, latency=2.0), {}, []
    search.options = {
        "conv": [Option("int4", 1, 0.2), Option("int8", 2, 0.1)],
        "head": [Option("int4", 1, 0.2), Option("int8", 2, 0.1)],
    }

    class Op:
        def __init__(self, name: str, native: str) -> None:
            self.name, self.native = name, native

    graph = type("G", (), {"ops": [Op("conv", "CONV_2D"), Op("head", "DENSE")]})()
    search.run = type("R", (), {"subject": type("S", (), {"graph": graph})()})()
    search.measure = measured.extend

    def time() -> None:  # int4 convolutions are slow
        search.latencies = {a: 5.0 if ("conv", "int4") in a else 1.0 for a in measured}

    search.time = time
    search.leave_slow_ones()
    assert search.schemes("conv") == ["int8"]
    assert search.schemes("head") == ["int4", "int8"]


def test_a_layer_that_the_base_leaves_float_gets_no_other_scheme():
    """int16 would take the layer of 9 weights, and with it its conversions and a slow kernel, for a few bytes."""
    net, weights = Net(), np.random.default_rng(0)
    x = net.input((1, 8, 8, 1), name="x")
    conv = ("Conv2DOptions", {"stride_h": 1, "stride_w": 1})
    small, wide = (weights.normal(size=shape).astype(np.float32) for shape in ((1, 3, 3, 1), (64, 3, 3, 1)))
    zero = [net.constant(np.zeros(n, np.float32)) for n in (1, 64)]
    stem = net.then("CONV_2D", [x, net.constant(small), zero[0]], (1, 8, 8, 1), conv, "stem")
    net.outputs.append(net.then("CONV_2D", [stem, net.constant(wide), zero[1]], (1, 8, 8, 64), conv, "wide"))
    assert list(choices(view(net.finish()), schemes("dynamic", "gptq"), ())) == ["wide"]


def test_few_samples_serve_both_parts_and_it_says_so(task, tmp_path):
    with ThreadPoolExecutor(2) as executor:
        found = tune(
            task[0], str(task[1]), output=tmp_path / "few.tflite", max_drop="50pt", limit=20, executor=executor
        )
    assert found.tuning.samples == (20, 20)
    assert any("few" in note for note in found.tuning.notes)


@pytest.mark.timeout(240)
def test_the_sweep_finishes_on_a_dask_cluster_that_loses_a_worker(task, tmp_path):
    """Two worker processes; one is killed while trials are under way."""
    distributed = need_module("distributed", "distributed", "Dask is not installed; `pip install distributed`")
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    )
    with cluster, distributed.Client(cluster) as client:
        victims = {name: worker["pid"] for name, worker in client.run(lambda: {"pid": os.getpid()}).items()}
        killed: list[int] = []

        def step(stage: str, done: int, total: int) -> None:
            if done == 2 and not killed:
                killed.append(next(iter(victims.values())))
                os.kill(killed[0], signal.SIGKILL)

        found = tune(
            task[0], str(task[1]), output=tmp_path / "dask.tflite", max_drop="3pt", limit=120, progress=step, width=2,
            executor=client.get_executor(),
        )  # fmt: skip
        assert killed
        deadline = time.monotonic() + 30
        while killed[0] in _pids(client) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert killed[0] not in _pids(client)
    assert {s.layer for s in found.tuning.sensitivity} == {"hidden", "head"}
    assert (tmp_path / "dask.tflite").exists()


def _pids(client) -> set[int]:
    return {found["pid"] for found in client.run(lambda: {"pid": os.getpid()}).values()}


def test_the_command_writes_model_recipe_results_and_page(task, tmp_path, monkeypatch, capsys):
    from paring.cli import main

    monkeypatch.chdir(tmp_path)
    words = [
        "paring", "tune", str(task[0]), "--data", str(task[1]), "--max-drop", "3pt", "-o", "out.tflite",
        "--html", "out.html", "--results", "out.json",
    ]  # fmt: skip
    for option, path, wrong in (
        ("--save-recipe", "no/r.yaml", "no folder no"), ("--save-recipe", "out.tflite", "one name"), ("--html", ".", "folder"),
    ):  # fmt: skip
        monkeypatch.setattr(sys, "argv", [*words, option, path])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 2
        assert wrong in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    said = capsys.readouterr().out
    assert "chosen" in said
    assert "trials" in said
    told = json.loads(Path("out.json").read_text())
    assert told["command"] == "tune"
    assert "<svg" in Path("out.html").read_text()
    recipe = Recipe.load("out.yaml")
    (chosen,) = (c for c in told["tuning"]["candidates"] if c["chosen"])
    assert recipe.to_data() == Recipe.load(chosen["recipe"]).to_data()
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "exists" in capsys.readouterr().err
