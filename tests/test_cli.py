"""The command line: what it prints, what it refuses in one line, and with which exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import paring
from paring import load
from paring.demo import load_digits, model_path
from paring.formats.tflite.constants import type_name
from paring.formats.tflite.view import view
from paring.recipe import ALIASES, Recipe, text_of

COMMANDS = (
    "quantize",
    "sparsify",
    "optimize",
    "inspect",
    "debug",
    "bench",
    "bench-algorithms",
    "tune",
    "recipes",
    "demo",
)


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs `paring ...` in this process, in an empty folder -> (exit code, stdout, stderr)."""
    from paring.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer sets its own

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["paring", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture
def refused(call):
    """Runs `paring quantize MODEL -o out.tflite ...`, which must end with one line and no file -> the line."""

    def run(
        *arguments: object,
        model: object = model_path(),
        output: str = "out.tflite",
        command: str = "quantize",
        code: int = 2,
    ) -> str:
        before = sorted(Path().iterdir())
        got, out, err = call(command, model, "-o", output, *arguments)
        assert got == code, err
        assert out == ""
        assert sorted(Path().iterdir()) == before
        [line] = err.splitlines()
        assert line.startswith("paring: ")
        assert line.endswith((".", "?", "!"))
        assert "Traceback" not in line
        return line

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, image=load_digits()[0][:6])
    return path


def float_ends(model: str | Path) -> list[str]:
    graph = view(load(model))
    return [graph.tensors[t].dtype for t in (*graph.inputs, *graph.outputs)]


# -- what works ------------------------------------------------------------------------------------------------------


def test_quantize_writes_the_model_and_a_table_of_every_operator(call):
    code, out, err = call("quantize", model_path(), "-o", "out.tflite", "--no-verify")
    assert (code, err) == (0, "")
    assert load("out.tflite").subgraphs
    assert "dynamic-int8: what each operator became" in out
    assert out.count("CONV_2D") == 2
    assert all(
        word in out
        for word in ("SOFTMAX", "has no weights", "7 operators: 4 float, 3 dynamic", "not verified (--no-verify)")
    )
    assert out.rstrip().endswith("wrote out.tflite")


def test_quantize_with_data_verifies_and_says_so(call, data):
    code, out, _ = call("quantize", model_path(), "-o", "out.tflite", "-r", "int8", "-d", data, "--max-error", "0.1")
    assert code == 0
    assert (
        "verified on XNNPACK (default): 6 quantized operators" in out
        or "verified on XNNPACK (default): 7 quantized operators" in out
    )
    assert "verified on builtin kernels" in out
    assert "output probabilities: relative difference 0.0" in out
    assert "on 6 samples" in out


def test_json_names_every_operator_and_nothing_else_is_printed(call, data):
    code, out, err = call("quantize", model_path(), "-o", "out.tflite", "--recipe", "int8", "--data", data, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row["name"] for row in facts["rows"]] == [op.name for op in view(load(model_path())).ops]
    assert all(row["mode"] == "static" and row["reason"] for row in facts["rows"])
    assert facts["output_bytes"] == Path("out.tflite").stat().st_size
    assert facts["source_bytes"] == model_path().stat().st_size
    assert facts["recipe"] == "int8"
    assert set(facts["verification"]["findings"]) == {"xnnpack", "builtin"}
    assert facts["verification"]["difference"]["probabilities"] < 0.02


def test_optimize_applies_a_recipe_file(call):
    recipe = Recipe.named("float16").restricted(skip=["digit_"])
    Path("mine.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    code, out, _ = call("optimize", model_path(), "-o", "out.tflite", "--recipe", "mine.yaml", "--no-verify")
    assert code == 0
    assert "skipped by request" in out
    assert "2 weight-only" in out


def test_skip_and_only_repeat(call):
    _, out, _ = call(
        "quantize", model_path(), "-o", "a.tflite", "--skip", "digit_", "--skip", "conv2d", "--no-verify", "--json"
    )
    assert [row["mode"] for row in json.loads(out)["rows"]].count("dynamic") == 1
    _, out, _ = call(
        "quantize", model_path(), "-o", "b.tflite", "--only", "digit_", "--only", "hidden", "--no-verify", "--json"
    )
    assert [row["mode"] for row in json.loads(out)["rows"]].count("dynamic") == 2


@pytest.mark.parametrize("io", ["int8", "uint8"])
def test_io_sets_the_types_of_inputs_and_outputs(call, data, io):
    code, _, err = call(
        "quantize", model_path(), "-o", "out.tflite", "-r", "int8", "-d", data, "--io", io, "--no-verify"
    )
    assert code == 0, err
    assert float_ends("out.tflite") == [io, io]


def test_range_and_bias_correction_override_the_recipe(call, data):
    arguments = ["--range", "mse", "--bias-correction", "--no-verify", "--json"]
    assert call("quantize", model_path(), "-o", "out.tflite", "-r", "int8", "-d", data, *arguments)[0] == 0
    model = load("out.tflite")
    entry = next(e for e in model.root.metadata if e.name == "paring")
    recipe = json.loads(model.payload(model.root.buffers[entry.buffer]).tobytes())["recipe"]
    assert recipe["rules"][0]["apply"]["quantize"] == {
        "weights": "int8",
        "activations": "int8",
        "range": "mse",
        "bias_correction": True,
    }


def test_saved_statistics_serve_instead_of_data(call, data):
    kept = ["--no-verify", "--json", "--save-statistics", "kept.npz"]
    assert call("quantize", model_path(), "-o", "a.tflite", "-r", "int8", "-d", data, *kept)[0] == 0
    assert (
        call("quantize", model_path(), "-o", "b.tflite", "-r", "int8", "--statistics", "kept.npz", "--no-verify")[0]
        == 0
    )
    assert Path("a.tflite").read_bytes() == Path("b.tflite").read_bytes()


def test_limit_bounds_the_samples(call, data):
    _, out, _ = call(
        "quantize", model_path(), "-o", "a.tflite", "-r", "int8", "-d", data, "--limit", 2, "--no-verify", "--json"
    )
    assert json.loads(out)["samples"] == 2


def test_overwrite_replaces(call):
    Path("out.tflite").write_bytes(b"old")
    assert call("quantize", model_path(), "-o", "out.tflite", "--overwrite", "--no-verify")[0] == 0
    assert Path("out.tflite").stat().st_size > 1000


def test_inspect_shows_every_operator(call):
    code, out, _ = call("inspect", model_path())
    assert code == 0
    assert out.count("CONV_2D") == 2
    assert "7 operators in 1 subgraphs" in out
    assert "signature serving_default: image -> probabilities" in out


def test_inspect_json_has_shapes_parameters_and_multiply_adds(call):
    facts = json.loads(call("inspect", model_path(), "--json")[1])
    first = facts["operators"][0]
    assert (first["native"], first["shape"], first["dtype"]) == ("CONV_2D", [1, 32, 32, 16], "float32") or first[
        "shape"
    ][0] == 1
    assert first["parameters"] == 3 * 3 * 16 + 16
    assert first["macs"] == int(np.prod(first["shape"])) * 9
    assert first["zeros"] == 0.0
    assert facts["bytes"] == model_path().stat().st_size


def test_inspect_without_zeros_reads_no_weight(call):
    assert json.loads(call("inspect", model_path(), "--json", "--no-zeros")[1])["operators"][0]["zeros"] is None


def test_inspect_tells_quantized_weights(call):
    call("quantize", model_path(), "-o", "out.tflite", "--no-verify")
    rows = json.loads(call("inspect", "out.tflite", "--json")[1])["operators"]
    assert [row["dtype"] for row in rows if row["kind"] == "dense"] == ["float32 x int8"] * 2


def test_recipes_lists_all_with_their_need_of_data(call):
    code, out, _ = call("recipes")
    assert code == 0
    cells = [[cell.strip() for cell in line.split("│")] for line in out.splitlines()]
    need = {row[1]: row[2] for row in cells if len(row) > 3 and row[1]}
    assert set(need) == set(Recipe.names())
    assert (need["int8"], need["dynamic-int4"], need["dynamic-int8"]) == ("needed", "helps", "no")
    assert all(old in out for old in ALIASES)


@pytest.mark.parametrize(("name", "file"), [("int4-int8", "int4-int8"), ("static_wi8_ai8", "int8")])
def test_recipes_prints_one_as_a_file_to_start_from(call, name, file):
    code, out, _ = call("recipes", name)
    assert (code, out) == (0, text_of(file))
    assert Recipe.parse(out).rules == Recipe.named(name).rules


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    assert f"paring {command}" in out
    assert "--help" in out


def test_help_lists_the_commands_and_version_is_the_packages(call):
    out = call("--help")[1]
    assert all(command in out for command in COMMANDS)
    assert call("--version")[:2] == (0, f"paring {paring.__version__}\n")


def test_an_interrupt_ends_with_130_and_one_line(call, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(Recipe, "names", staticmethod(interrupted))
    assert call("recipes") == (130, "", "paring: interrupted, nothing was written\n")


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_static_recipe_without_data_says_what_to_give(refused):
    line = refused("--recipe", "int8")
    assert "recipe int8 needs calibration data" in line
    assert "--data" in line


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (
            {"imag": np.zeros((2, 32, 32, 1), np.float32), "x": np.zeros(2)},
            ["wrong input name", "expected image", "Did you mean image?"],
        ),
        ({"image": np.zeros((2, 28, 28, 1), np.float32)}, ["input image", "[N, 32, 32, 1]", "[2, 28, 28, 1]"]),
        ({"image": np.zeros((0, 32, 32, 1), np.float32)}, ["no samples"]),
        ({"image": np.full((1, 32, 32, 1), np.nan, np.float32)}, ["finite"]),
    ],
    ids=["name", "shape", "empty", "not a number"],
)
def test_data_that_does_not_fit_says_what_does(refused, arrays, words):
    np.savez("data.npz", **arrays)
    line = refused("--recipe", "int8", "--data", "data.npz")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "int9"], ["unknown recipe for int9", "Did you mean 'int8'?"]),
        (["--recipe", "absent.yaml"], ["cannot read the recipe for absent.yaml", "No such file"]),
        (["--data", "absent.npz"], ["no such data for absent.npz"]),
        (["--data", "nomodule:f"], ["nomodule"]),
        (["--statistics", "absent.npz"], ["absent.npz"]),
        (["--io", "int4", "--recipe", "int8"], ["bad --io", "float32, int8, uint8, int16", "got int4"]),
        (["--io", "int8"], ["recipe dynamic-int8", "expected static activations"]),
        (["--range", "best"], ["quantize.range", "minmax, percentile, mse"]),
        (["--skip", "hiden"], ["--skip hiden matches no operator", "hidden"]),
        (["--only", "conv3d"], ["--only conv3d matches no operator", "conv2d"]),
        (["--skip", "("], ["bad pattern for ("]),
        (["--image-range", "0,1"], ["image range"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("-") else None,
)
def test_wrong_usage_is_one_line(refused, arguments, words):
    line = refused(*arguments)
    assert all(word in line for word in words), line


def test_an_unknown_key_of_a_recipe_file_is_named_with_the_nearest(refused):
    Path("mine.yaml").write_text("rules: [{knd: dense, apply: float}]", encoding="utf-8")
    line = refused("--recipe", "mine.yaml", command="optimize")
    assert "unknown key 'knd' in mine.yaml, rule 1" in line
    assert "Did you mean 'kind'?" in line


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("out.keras", ".keras, which has no place for integer weights"),
        ("out.bin", "an output that ends in .tflite"),
        ("absent/out.tflite", "no folder absent"),
    ],
)
def test_an_output_that_cannot_be_is_refused(refused, name, words):
    assert words in refused(output=name)


def test_an_output_that_exists_is_refused(refused):
    Path("out.tflite").write_bytes(b"old")
    assert "the output exists for out.tflite. Say --overwrite to replace it." in refused()
    assert Path("out.tflite").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such model for model.tflite"),
        (b"", "an empty file"),
        (b"hello" * 9, "cannot read model.tflite as a .tflite model"),
    ],
)
def test_a_file_that_is_no_model_is_refused(refused, content, words):
    if content is not None:
        Path("model.tflite").write_bytes(content)
    assert words in refused(model="model.tflite")


def test_a_cut_model_is_refused(refused):
    Path("model.tflite").write_bytes(model_path().read_bytes()[:200_000])
    assert "Is the file complete?" in refused(model="model.tflite")


def test_inspect_refuses_the_same_way(call):
    code, out, err = call("inspect", "absent.tflite")
    assert (code, out, err) == (2, "", "paring: no such model for absent.tflite.\n")


def test_recipes_refuses_an_unknown_name(call):
    code, _, err = call("recipes", "int88")
    assert code == 2
    assert "Did you mean 'int8'?" in err


def test_a_folder_of_images_needs_the_range_of_a_float_input(refused):
    image = pytest.importorskip("PIL.Image")
    Path("images").mkdir()
    image.fromarray(np.zeros((32, 32), np.uint8)).save("images/a.png")
    assert "--image-range" in refused("--recipe", "int8", "--data", "images")


def test_a_folder_without_images_is_refused(refused):
    Path("images").mkdir()
    assert "image" in refused("--recipe", "int8", "--data", "images", "--image-range", "0,1")


def test_statistics_that_nobody_collected_cannot_be_saved(refused):
    line = refused("--save-statistics", "kept.npz")
    assert "there are no statistics to save for kept.npz. Give --data." in line


def test_a_place_where_statistics_cannot_be_written_is_said_first(refused, data):
    line = refused("-r", "int8", "-d", data, "--save-statistics", "absent/kept.npz")
    assert "cannot write the statistics for absent/kept.npz: got no folder absent" in line


def test_a_recipe_that_asks_for_no_statistics_says_that_none_were_kept(call, data):
    code, _, err = call(
        "quantize",
        model_path(),
        "-o",
        "a.tflite",
        "-r",
        "float16",
        "-d",
        data,
        "--no-verify",
        "--save-statistics",
        "kept.npz",
    )
    assert (code, err) == (0, "paring: the recipe asks for no statistics, so kept.npz was not written\n")
    assert not Path("kept.npz").exists()


def test_a_bound_that_is_missed_ends_with_1(refused, data):
    line = refused("--data", data, "--max-error", "0", code=1)
    assert "the result differs too much for output probabilities" in line


def test_strict_ends_with_1_and_names_the_operators(refused):
    line = refused("--strict", code=1)
    assert "operators would stay float" in line
    assert "has no weights" in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize"],
        ["quantise", "x"],
        ["quantize", "x", "--nonsense"],
        ["inspect"],
        ["quantize", "x", "-o", "y.tflite", "--limit", "0"],
    ],
)
def test_usage_errors_end_with_2(call, arguments):
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert "Usage: paring" in err


# -- the real thing --------------------------------------------------------------------------------------------------

ENTRY = [sys.executable, "-c", "from paring.cli import main; main()"]


def test_a_process_with_another_hash_seed_writes_the_same_bytes(call, data, tmp_path):
    arguments = ["quantize", str(model_path()), "-r", "int4-int8", "-d", str(data), "--no-verify"]
    call(*arguments, "-o", "here.tflite")
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run(
        [*ENTRY, *arguments, "-o", "there.tflite"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path("there.tflite").read_bytes() == Path("here.tflite").read_bytes()


def test_a_failing_process_ends_with_one_line_and_2(tmp_path):
    done = subprocess.run(
        [*ENTRY, "quantize", "absent.tflite", "-o", "out.tflite"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "paring: no such model for absent.tflite.\n"


def test_an_output_is_float_outside_by_default(call):
    call("quantize", model_path(), "-o", "out.tflite", "--no-verify")
    model = load("out.tflite")
    assert float_ends("out.tflite") == ["float32", "float32"]
    assert {type_name(t) for t in model.subgraphs[0].tensors} >= {"float32", "int8"}
