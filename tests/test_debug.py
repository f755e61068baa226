"""`paring debug`: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_cli import call  # noqa: F401  (a fixture)
from test_compare import network, samples

from paring import optimize
from paring.demo import load_digits, model_path
from paring.recipe import Recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model with a loud channel, its int8 file, its data; and the digits with theirs."""
    folder = tmp_path_factory.mktemp("debug")
    model, data = network(loud=100.0), samples()
    model.save(folder / "float.tflite")
    np.savez(folder / "data.npz", **data)
    optimize(folder / "float.tflite", "int8", data, output=folder / "int8.tflite", verified=False)
    calibration, images, labels = load_digits()
    optimize(model_path(), "int8", calibration, output=folder / "digits.tflite", verified=False)
    np.savez(folder / "digits.npz", image=images[:20])
    np.save(folder / "labels.npy", labels[:20])
    return folder


def test_it_names_the_culprit_and_prints_lines_that_a_recipe_takes(call: Any, files: Path):  # noqa: F811
    code, out, err = call("debug", files / "float.tflite", files / "int8.tflite", "--data", files / "data.npz")
    assert code == 0, err
    rows = [line for line in out.splitlines() if "FULLY_CONNECTED" in line and "culprit" not in line]
    assert "dense1" in rows[0] and len(rows) == 4
    assert "culprit: dense1 (FULLY_CONNECTED, int8): the steps of its result's grid are too coarse for it" in out
    assert "output dense3: " in out and "on 32 samples" in out
    lines = [line for line in out.splitlines() if line.startswith("  - {")]
    assert [rule.name for rule in Recipe.parse("rules:\n" + "\n".join(lines)).rules] == ["^dense1$", "^dense2$"]


def test_all_figures_as_json_and_in_a_file(call: Any, files: Path):  # noqa: F811
    arguments = ("debug", model_path(), files / "digits.tflite", "--data", files / "digits.npz")
    code, out, err = call(*arguments, "--labels", files / "labels.npy", "--json", "--limit", 10)
    assert code == 0, err
    found = json.loads(out)
    assert found["command"] == "debug" and found["environment"]["python"]
    comparison = found["comparison"]
    assert comparison["samples"] == 10 and comparison["recipe"]["name"] == "int8" and comparison["culprits"] == []
    assert any("right in float" in note for note in comparison["notes"])
    assert sum(comparison["layers"][1]["activation"]["counts"]) > 0
    assert sorted(comparison["ranking"]) == [n for n, x in enumerate(comparison["layers"]) if x["blame"] is not None]
    code, out, err = call(*arguments, "--limit", 10, "--results", "results.json")
    assert code == 0 and "wrote results.json" in out and "no layer stands out" in out, err
    written = json.loads(Path("results.json").read_text(encoding="utf-8"))
    assert written["comparison"]["layers"] == comparison["layers"]


def test_without_data_it_says_so_and_with_all_it_lists_what_is_not_ranked(call: Any, files: Path):  # noqa: F811
    code, out, err = call("debug", model_path(), files / "digits.tflite", "--all")
    assert code == 0 and "note: the samples were made up" in out, err


def test_the_page_is_made_of_the_same_results(call: Any, files: Path, monkeypatch: pytest.MonkeyPatch):  # noqa: F811
    page, got = ModuleType("paring.report.page"), {}
    page.write_page = lambda path, results: got.update({str(path): results})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "paring.report.page", page)
    arguments = ("debug", files / "float.tflite", files / "int8.tflite", "-d", files / "data.npz")
    code, out, err = call(*arguments, "--html", "report.html", "--results", "results.json")
    assert code == 0 and "wrote report.html" in out, err
    assert got["report.html"] == json.loads(Path("results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("{f}/float.tflite", "{f}/digits.tflite"),
            r"the models do not correspond for input x: expected \[1, 24\], got",
        ),
        (("{f}/float.tflite", "{f}/none.tflite"), "no such model"),
        (("{f}/float.tflite", "{f}/int8.tflite", "--html", "nowhere/x.html"), "cannot write the page"),
        (("{f}/float.tflite", "{f}/int8.tflite", "--results", "nowhere/x.json"), "cannot write the results"),
        (("{f}/float.tflite", "{f}/int8.tflite", "--labels", "{f}/labels.npy"), "labels without samples"),
        (("{f}/float.tflite", "{f}/int8.tflite", "--data", "{f}/digits.npz"), "wrong shape for"),
    ],
)
def test_bad_input_ends_with_one_line(call: Any, files: Path, arguments: tuple[str, ...], said: str):  # noqa: F811
    code, out, err = call("debug", *(a.format(f=files) for a in arguments))
    [line] = err.splitlines()
    assert code == 2 and out == "" and line.startswith("paring: ")
    assert re.search(said, line), line
