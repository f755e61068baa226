"""`paring bench-algorithms`: what is compared, what is refused, what comes out, and that budgets are equal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import broken_algorithms
import numpy as np
import pytest
from conftest import need_module

import paring
from paring.compress import Algorithm, Cluster, Quantize, chain
from paring.errors import InputError
from paring.measure.algorithms import BUILT_IN, Entry, data_set, entry, order, summary
from paring.measure.result import AlgorithmRun
from paring.recipe import Recipe

# Keras variables predate NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

MINE = "broken_algorithms:Halves{unit: 0.125}"
PRUNED = "sparsify{sparsity: 0.5}+quantize{weights: int8, activations: int8}"
THIN = "low_rank{rank: 2}"


@pytest.fixture
def keras(tensorflow: Any) -> Any:
    return need_module("keras", "keras", "Keras is not installed; `pip install keras`")


@dataclass(frozen=True)
class Failing(broken_algorithms.Halves):
    """Keeps the contract as far as NumPy can tell, and fails in training."""

    def project(self, ops, weight, variables, step, context):
        raise RuntimeError("no such operation")


@dataclass(frozen=True)
class OnlyFiles(Algorithm):
    """Without a `project`."""

    def encode(self, weight, context):
        return Quantize("float16", "float").encode(weight, context)


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """`paring bench-algorithms ...` in this process -> exit code, stdout, stderr."""
    from paring.cli import main

    monkeypatch.setattr("sys.argv", ["paring", "bench-algorithms", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


# -- what is compared --------------------------------------------------------------------------------------------------


def test_an_entry_is_a_stage_a_class_or_a_chain_of_them():
    assert entry(MINE).stages == (broken_algorithms.Halves(0.125),)
    found = entry("sparsify{sparsity: 0.5, pattern: '2:4'} + cluster + quantize{weights: int4, activations: float}")
    assert [type(stage).__name__ for stage in found.stages] == ["Sparsify", "Cluster", "Quantize"]
    from_object = entry(chain(Cluster(4), Quantize("int8", "float")))
    assert entry(from_object.label) == from_object
    for text in BUILT_IN.values():
        assert Recipe.load(entry(text).recipe.to_data()).rules[0].stages == entry(text).stages


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("clutser", "unknown algorithm 'clutser' in algorithm clutser.*Did you mean 'cluster'"),
        ("absent_module:Mine", "no such module for absent_module:Mine"),
        ("broken_algorithms:Thirds", "no such class for broken_algorithms:Thirds"),
        ("pathlib:Path", "cannot take 'pathlib:Path'.*expected a dataclass derived from"),
        ("cluster{clusters: 1}", "clusters"),
        ("cluster{cluster: 4}", "unknown key 'cluster'.*Did you mean 'clusters'"),
        ("cluster{clusters: 4", "cannot read the algorithm.*Quote it for the shell"),
        ("quantize+cluster", "each stage at most once, quantize last"),
    ],
)
def test_what_is_no_algorithm_is_named(asked: str, message: str):
    with pytest.raises(InputError, match=message):
        entry(asked)


def test_every_digit_is_tested_on_once_by_three_seeds():
    digits = data_set("digits")
    tested = [digits.split(seed)[2] for seed in range(3)]
    assert sorted(np.concatenate(tested).tobytes()) == sorted(digits.images.tobytes())
    for seed in range(3):
        train, _, test, _ = digits.split(seed)
        assert not {image.tobytes() for image in train} & {image.tobytes() for image in test} or len(train) == 399


def test_data_of_ones_own(tmp_path: Path):
    images, classes = np.full((6, 4, 4), 255, np.uint8), np.arange(6).reshape(6, 1) % 3
    given = {"x_train": images, "y_train": classes, "x_test": images[:2], "y_test": classes[:2]}
    path = tmp_path / "own.npz"
    np.savez(path, **given)
    found = data_set(str(path))
    assert (found.name, found.count) == ("own", 3)
    assert [part.shape for part in found.split(5)] == [(6, 4, 4, 1), (6,), (2, 4, 4, 1), (2,)]
    assert found.images.dtype == np.float32 and found.images.max() == 1.0
    for changed, message in (
        ({"y_test": None}, "expected x_train, y_train, x_test, y_test"),
        ({"y_train": classes[:3]}, "y_train of .*6 classes"),
        ({"x_test": images[:2, :3]}, "x_test of .*expected 4x4x1 as in x_train, got 3x4x1"),
        ({"x_train": np.full((6, 4, 4), np.nan)}, "expected finite values"),
        ({"x_train": images.reshape(6, 16)}, "expected images"),
    ):
        np.savez(path, **{k: v for k, v in (given | changed).items() if v is not None})
        with pytest.raises(InputError, match=message):
            data_set(str(path))
    path.write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot read the data"):
        data_set(str(path))


def test_the_order_depends_on_the_seed_alone():
    assert np.array_equal(order(10, 4, 7, (1, 0)), order(10, 4, 7, (1, 0)))
    assert not np.array_equal(order(10, 4, 7, (1, 0)), order(10, 4, 7, (2, 0)))


def test_figures_over_seeds():
    runs = [AlgorithmRun(0, 0.9, -1.0, 100, 50, 0.5, 16), AlgorithmRun(1, 0.8, -3.0, 110, 60, 0.4, 12)]
    row = summary(Entry("mine"), runs, [1.0, 2.0, 3.0], ["said", "said"])
    assert (row.score, row.change, row.bytes, row.zstd) == (pytest.approx(0.85), -2.0, 105.0, 55.0)
    assert row.score_sd == pytest.approx(0.0707, abs=1e-4) and row.change_sd == pytest.approx(2**0.5)
    assert (row.zeros, row.distinct, row.step, row.step_low, row.notes) == (0.4, 16, 2.0, 1.5, ("said",))
    alone = summary(Entry("mine"), runs[:1], [], [])
    assert (alone.score_sd, alone.change_sd, alone.step) == (None, None, None)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-a", "broken_algorithms:Flat"], "the algorithm breaks the contract for broken_algorithms:Flat, encode and decode"),
        (["-a", "clutser"], "unknown algorithm 'clutser'"),
        (["-a", "test_bench_algorithms:OnlyFiles"], "expected a `project` method of OnlyFiles"),
        (["-a", MINE, "-a", MINE], "two algorithms have one name"),
        (["--data", "absent.npz"], "cannot read the data for absent.npz"),
        (["--model", "test_bench_algorithms:absent"], "no such function"),
        (["-o", "absent/results.json"], "cannot write the results"),
        (["--html", "absent/page.html"], "cannot write the page"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_trained(
    words: list[str], message: str, keras: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    del keras
    code, out, err = call(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1] and "Traceback" not in err


def test_without_keras_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from importlib.util import find_spec

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "keras" else find_spec(name, *a))
    code, _, err = call(monkeypatch, capsys)
    assert code == 2
    assert err.startswith("paring: keras is not installed: training needs it. Install it: pip install")


def test_an_algorithm_that_fails_in_training_is_named(keras: Any):
    del keras
    with pytest.raises(InputError, match=r"cannot be trained for .*Failing.*RuntimeError: .*no such operation"):
        paring.bench_algorithms([Failing()], models=["mlp"], seeds=1, steps=1, built_in=False)


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tensorflow: Any) -> tuple[dict[str, Any], str, str]:
    """One short run of the command line -> results, page, table."""
    need_module("keras", "keras", "Keras is not installed; `pip install keras`")
    import contextlib
    import io

    from paring.cli import main

    folder = tmp_path_factory.mktemp("bench")
    words = ["--no-built-in", "--seeds", "1", "--steps", "12", "--model", "mlp", "-a", MINE, "-a", PRUNED, "-a", THIN]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        paths = ["-o", str(folder / "r.json"), "--html", str(folder / "p.html")]
        patch.setattr("sys.argv", ["paring", "bench-algorithms", *words, *paths])
        main()
    assert not ended.value.code
    results = json.loads((folder / "r.json").read_text(encoding="utf-8"))
    return results, (folder / "p.html").read_text(encoding="utf-8"), said.getvalue()


def test_every_algorithm_is_judged_by_its_file(measured: tuple[dict[str, Any], str, str]):
    results, _, _ = measured
    found = results["algorithms"]
    (table,) = found["tables"]
    rows = {row["label"]: row for row in table["rows"]}
    assert (results["command"], found["seeds"], found["steps"], table["samples"]) == (
        "bench-algorithms",
        1,
        12,
        [399, 200],
    )
    assert list(rows) == ["float", MINE, PRUNED, THIN]
    assert {label: row["notes"] for label, row in rows.items()} == {label: [] for label in rows}
    floats = rows["float"]
    assert (floats["change"], floats["step"], floats["zeros"]) == (0.0, 1.0, pytest.approx(0.0, abs=0.01))
    assert floats["bytes"] > 4 * table["parameters"] > floats["zstd"] > 0
    assert floats["score"] > 0.3  # of ten classes, after 24 steps
    for row in rows.values():
        assert row["change"] == pytest.approx(100 * (row["score"] - floats["score"]))
        assert row["step"] > 0
    assert rows[PRUNED]["zeros"] >= 0.5 and rows[PRUNED]["bytes"] < floats["bytes"] / 2
    assert rows[MINE]["distinct"] < 40 < floats["distinct"]
    assert rows[THIN]["bytes"] < floats["bytes"] / 2  # the factors are stored, not their product


def test_the_table_and_the_page_show_them(measured: tuple[dict[str, Any], str, str]):
    _, page, said = measured
    assert "mlp (9,610 parameters) on digits, tested on 200 samples a seed" in said
    assert "low_rank{rank: 2}" in said and "wrote " in said
    assert "with fewer than three seeds the spread says little" in said
    assert "mlp on digits" in page and THIN in page
    assert page.count('class="expand name"') == 4
