"""A model all the way through: what comes out runs, is smaller, says what it is; what fails leaves nothing behind."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import Net

from paring import BoundError, InputError, Recipe, Rule, load, optimize
from paring.compress.quantize import Quantize
from paring.demo import load_digits, model_path
from paring.formats.tflite.constants import quantization_of, type_name
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.view import view
from paring.graph import Quantization
from paring.optimize import Result
from paring.optimize import _judge as judge
from paring.report import to_json
from paring.verify import Verification

# Recipe -> (size, relative difference of the output) beside the float model, at most.
BOUNDS = {
    "dynamic-int8": (0.27, 0.005),
    "dynamic-int4": (0.14, 0.05),
    "dynamic-int4-block32": (0.15, 0.05),
    "dynamic-int4-block64": (0.14, 0.05),
    "dynamic-int4-block128": (0.14, 0.05),
    "dynamic-int4-block256": (0.14, 0.05),
    "float16": (0.51, 0.001),
    "int4-int8": (0.14, 0.1),
    "int8": (0.27, 0.02),
    "int8-int16": (0.27, 0.005),
    "weight-only-int4": (0.14, 0.05),
    "weight-only-int8": (0.27, 0.005),
}
STATIC = ("int8", "int8-int16", "int4-int8")


@functools.cache
def images(count: int = 12) -> np.ndarray:
    return load_digits()[0][:count]


@functools.cache
def quick(recipe: str, inputs: str = "float32") -> Result:
    """The demo model with a named recipe, not verified; many tests look at it."""
    return optimize(
        model_path(), replace(Recipe.named(recipe), inputs=inputs, outputs=inputs), images(), verified=False
    )


def run(
    model: TfliteModel | bytes | Path, *samples: np.ndarray, kernels: str = "BUILTIN_WITHOUT_DEFAULT_DELEGATES"
) -> list[np.ndarray]:
    """First outputs, sample by sample; each sample is a model's inputs in order, or its only one."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    content = (
        model.to_bytes() if isinstance(model, TfliteModel) else model.read_bytes() if isinstance(model, Path) else model
    )
    interpreter = Interpreter(model_content=content, experimental_op_resolver_type=OpResolverType[kernels])
    interpreter.allocate_tensors()
    found = []
    for sample in samples:
        given = sample if isinstance(sample, (list, tuple)) else [sample]
        for detail, array in zip(interpreter.get_input_details(), given, strict=True):
            interpreter.set_tensor(detail["index"], array)
        interpreter.invoke()
        found.append(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    return found


def modes(result: Result) -> dict[str, str]:
    """Mode by kind, names shortened to what tells the demo model's layers apart."""
    return {row.name.split("/")[1].split("_")[0]: row.mode for row in result.report.rows if "/" in row.name}


def stored(model: TfliteModel) -> set[str]:
    """Types that weights are stored in; biases, and int32 shapes, apart."""
    tensors = view(model).tensors.values()
    return {t.weight.stored for t in tensors if t.weight is not None and len(t.shape) > 1}


def metadata(model: TfliteModel, name: str) -> bytes | None:
    entry = next((e for e in model.root.metadata or () if e.name == name), None)
    return None if entry is None else model.payload(model.root.buffers[entry.buffer]).tobytes()


# -- named recipes ---------------------------------------------------------------------------------------------------


def test_every_named_recipe_has_its_bounds():
    assert set(BOUNDS) == set(Recipe.names()) - {"bf16-int8", "bfloat16"}  # for SavedModels: test_saved_model.py


@pytest.mark.parametrize("recipe", BOUNDS)
def test_every_named_recipe_gives_a_small_model_that_is_verified_on_both_paths(recipe):
    report, (size, difference) = optimize(model_path(), recipe, images()).report, BOUNDS[recipe]
    assert report.ratio <= size
    found = report.verification
    assert found.given
    assert not found.failed
    assert not found.skipped
    assert not found.nan
    for path in ("xnnpack", "builtin"):
        assert len(found.findings[path]) >= 3 or recipe in ("float16", "weight-only-int8", "weight-only-int4")
        assert not found.wrong(path)
    assert found.samples == 12
    assert found.difference["probabilities"] <= difference


@pytest.mark.parametrize("recipe", BOUNDS)
def test_every_operator_of_the_input_is_in_the_report_with_a_reason(recipe):
    rows, graph = quick(recipe).report.rows, view(load(model_path()))
    assert [row.name for row in rows] == [op.name for op in graph.ops]
    assert all(row.reason for row in rows)


@pytest.mark.parametrize("recipe", BOUNDS)
def test_metadata_says_recipe_version_and_oldest_runtime(recipe):
    import paring

    result = quick(recipe)
    record = json.loads(metadata(result.model, "paring"))
    assert record["paring"] == paring.__version__
    assert Recipe.load(record["recipe"]) == Recipe.named(recipe)
    assert metadata(result.model, "min_runtime_version").rstrip(b"\0").decode() == result.report.runtime


def test_the_oldest_runtime_does_not_count_operators_that_are_gone():
    again = optimize(quick("float16").model, "int8", images(), verified=False)
    assert metadata(again.model, "min_runtime_version") == metadata(quick("int8").model, "min_runtime_version")


@pytest.mark.parametrize("recipe", STATIC)
def test_static_recipes_leave_no_float_operator_on_this_model(recipe):
    assert set(modes(quick(recipe)).values()) == {"static"}


# -- selective -------------------------------------------------------------------------------------------------------


def test_skip_leaves_the_named_operators_float():
    result = optimize(model_path(), "dynamic-int8", skip=["hidden", "conv2d"], verified=False)
    assert modes(result) == {
        "conv1": "float",
        "pool1": "float",
        "conv2": "float",
        "flat": "float",
        "hidden": "float",
        "digit": "dynamic",
    }
    assert stored(result.model) == {"float32", "int8"}


def test_only_leaves_all_others_float():
    result = optimize(model_path(), "dynamic-int8", only=["hidden"], verified=False)
    assert [name for name, mode in modes(result).items() if mode != "float"] == ["hidden"]
    assert json.loads(metadata(result.model, "paring"))["recipe"]["only"] == ["hidden"]


def test_rules_mix_static_int8_a_float_head_and_int4_blocks_in_one_model():
    rules = (
        Rule((Quantize(activations="int8"),)),
        Rule((Quantize("int4", "dynamic", "block", 32),), name="hidden"),
        Rule((), kind="softmax"),
        Rule((), position="last"),
    )
    result = optimize(model_path(), Recipe(rules), images())
    assert modes(result) == {
        "conv1": "static",
        "pool1": "static",
        "conv2": "static",
        "flat": "static",
        "hidden": "dynamic",
        "digit": "float",
    }
    graph = view(result.model)
    held = {
        op.name.split("/")[1].split("_")[0]: t.weight.stored
        for op in graph.ops
        for _, t in graph.weights_of(op)
        if "/" in op.name
    }
    assert held == {"conv1": "int8", "conv2": "int8", "hidden": "int4", "digit": "float32"}
    assert result.report.verification.difference["probabilities"] < 0.05


def test_settings_of_a_recipe_file_are_used(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "rules: [{kind: dense, apply: {quantize: {weights: float16, activations: float}}}]", encoding="utf-8"
    )
    result = optimize(model_path(), path, verified=False)
    assert [name for name, mode in modes(result).items() if mode == "weight-only"] == ["hidden", "digit"]


# -- borders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("recipe", "dtype"), [("int8", "int8"), ("int8", "uint8"), ("int8-int16", "int16")])
def test_integer_inputs_and_outputs_carry_the_same_values(recipe, dtype):
    whole, real = quick(recipe, dtype).model, quick(recipe).model
    graph = whole.subgraphs[0]
    ends = [graph.tensors[int(side[0])] for side in (graph.inputs, graph.outputs)]
    assert [type_name(t) for t in ends] == [dtype, dtype]
    grid_in, grid_out = (quantization_of(whole, graph, t) for t in ends)
    info = np.iinfo(dtype)
    samples = [image[None] for image in images()]
    codes = [
        np.clip(np.rint(x / grid_in.scale) + grid_in.zero_point, info.min, info.max).astype(dtype) for x in samples
    ]
    for got, wanted in zip(run(whole, *codes), run(real, *samples), strict=True):
        value = (got.astype(np.float64) - grid_out.zero_point) * grid_out.scale
        assert np.abs(value - wanted).max() <= grid_out.scale[0] * 1.001


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
def test_integer_borders_keep_names_and_signatures(dtype):
    def ends(model: TfliteModel) -> list:
        [signature] = model.root.signature_defs
        graph = model.subgraphs[signature.subgraph_index]
        sides = ((signature.inputs, graph.inputs), (signature.outputs, graph.outputs))
        return [
            (e.name, graph.tensors[e.tensor_index].name, e.tensor_index == int(side[0]))
            for entries, side in sides
            for e in entries
        ]

    assert ends(quick("int8", dtype).model) == ends(load(model_path()))
    assert all(same for _, _, same in ends(quick("int8", dtype).model))


def test_integer_borders_are_verified():
    recipe = replace(Recipe.named("int8"), inputs="uint8", outputs="int8")
    found = optimize(model_path(), recipe, images()).report.verification
    assert not found.wrong("xnnpack")
    assert found.difference["probabilities"] < 0.02


def test_integer_borders_without_static_activations_are_refused():
    recipe = replace(Recipe.named("dynamic-int8"), inputs="int8")
    with pytest.raises(
        InputError, match=r"recipe dynamic-int8: expected static activations\. Take a recipe such as int8"
    ):
        optimize(model_path(), recipe, verified=False)


def test_a_border_that_cannot_be_an_integer_is_noted():
    recipe = replace(Recipe.named("int8"), inputs="int8", outputs="int8")
    notes = optimize(model_path(), recipe, images(), skip=["softmax"], verified=False).report.notes
    assert [note for note in notes if "stays float32" in note] == [
        f"output {model_output()} stays float32, not int8: what it touches is not int8"
    ]


def model_output() -> str:
    graph = view(load(model_path()))
    return graph.tensors[graph.outputs[0]].name


# -- what was made smaller before ------------------------------------------------------------------------------------


def test_float16_weights_behind_dequantize_are_float_weights():
    again = optimize(quick("float16").model, "int8", images(), verified=False)
    assert set(modes(again).values()) <= {"static", "constant"}
    assert stored(again.model) == {"int8"}
    assert again.report.output_bytes == pytest.approx(quick("int8").report.output_bytes, rel=0.02)
    ours, direct = (np.array(run(r.model, *[i[None] for i in images()])) for r in (again, quick("int8")))
    assert np.abs(ours - direct).max() < 0.02


def test_int8_weights_behind_dequantize_keep_their_codes():
    before = quick("weight-only-int8").model
    again = optimize(before, "int8", images(), verified=False)
    assert stored(again.model) == {"int8"}

    def codes(model: TfliteModel) -> set[bytes]:
        found = (t.weight for t in view(model).tensors.values())
        return {w.read().tobytes() for w in found if w is not None and w.dtype == "int8" and w.size > 1000}

    assert len(codes(before)) == 3
    assert codes(again.model) == codes(before)


@pytest.mark.parametrize("recipe", ["dynamic-int8", "int8", "float16", "dynamic-int4"])
def test_a_quantized_model_is_left_alone_and_the_report_says_so(recipe):
    before = quick("int8")
    again = optimize(before.model, recipe, images(), verified=False)
    assert {row.mode for row in again.report.rows} == {"kept"}
    assert any("were quantized already" in note for note in again.report.notes)
    samples = [i[None] for i in images(3)]
    assert np.array_equal(run(again.model, *samples), run(before.model, *samples))


def test_a_dynamic_model_becomes_static_with_the_same_weights():
    again = optimize(quick("dynamic-int8").model, "int8", images(), verified=False)
    assert {row.mode for row in again.report.rows} == {"static"}
    assert stored(again.model) == {"int8"}


def carrying(pairs: dict[str, Quantization]) -> TfliteModel:
    """x -> dense -> y, where each name in `pairs` stands behind a QUANTIZE and a DEQUANTIZE."""
    rng, net = np.random.default_rng(0), Net()

    def pair(index: int, name: str) -> int:
        if name not in pairs:
            return index
        index = net.stored(index, pairs[name], f"{name}:stored")
        return net.then(
            "DEQUANTIZE", [index], net.graph.tensors[index].shape, ("DequantizeOptions", {}), f"{name}:real"
        )

    x = pair(net.input((1, 16), name="x"), "x")
    w, b = rng.normal(0, 1, (8, 16)).astype(np.float32), rng.normal(0, 1, 8).astype(np.float32)
    y = net.then("FULLY_CONNECTED", [x, net.constant(w), net.constant(b)], (1, 8), ("FullyConnectedOptions", {}), "y")
    y = pair(y, "y")
    net.outputs.append(net.then("RELU", [y], (1, 8), name="z"))
    return net.finish()


def grid(scale: float, zero: int, dtype: str = "int8") -> Quantization:
    return Quantization(np.array([scale], np.float32), np.array([zero], np.int64), dtype)


def test_ranges_that_the_model_carries_are_used_as_they_are():
    pairs = {"x": grid(0.03, -5), "y": grid(0.2, 7)}
    data = np.random.default_rng(1).uniform(-3, 3, (8, 16)).astype(np.float32)
    result = optimize(carrying(pairs), "int8", data)
    graph = view(result.model)
    dense = next(op for op in graph.ops if op.kind == "dense")
    assert graph.tensors[dense.inputs[0]].quantization.same_grid(pairs["x"])
    assert graph.tensors[dense.outputs[0]].quantization.same_grid(pairs["y"])
    assert not result.report.verification.wrong("builtin")


def test_carried_ranges_need_no_data():
    result = optimize(carrying({"x": grid(0.03, -5), "y": grid(0.2, 7)}), "int8", only=["y"], verified=False)
    natives = [op.native for op in view(result.model).ops]
    assert natives == ["QUANTIZE", "FULLY_CONNECTED", "DEQUANTIZE", "RELU"]
    assert result.statistics is None


def test_a_range_that_is_not_carried_still_needs_data():
    with pytest.raises(InputError, match="needs calibration data"):
        optimize(carrying({"x": grid(0.03, -5)}), "int8", verified=False)


def test_sparse_weights_stay_behind_densify_unless_asked(shared):
    path = shared / "models" / "face_detection_full_range_sparse.tflite"
    left = optimize(path, "dynamic-int8", verified=False)
    dense = optimize(path, "dynamic-int8", densify=True, verified=False)
    reasons = {row.reason for row in left.report.rows if "--densify" in row.reason}
    assert reasons
    assert not {row.reason for row in dense.report.rows if "--densify" in row.reason}
    assert any(t.sparsity is not None for t in left.model.subgraphs[0].tensors)
    assert not any(t.sparsity is not None for t in dense.model.subgraphs[0].tensors)
    assert not any(op.native == "DENSIFY" for op in view(dense.model).ops)


def test_densified_weights_run(shared):
    path = shared / "models" / "face_detection_full_range_sparse.tflite"
    result = optimize(path, "weight-only-int8", densify=True, verified=False)
    x = (
        np.random.default_rng(0)
        .uniform(-1, 1, view(load(path)).tensors[view(load(path)).inputs[0]].shape)
        .astype(np.float32)
    )
    [before], [after] = run(path, x, kernels="BUILTIN"), run(result.model, x, kernels="BUILTIN")
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(before)


# -- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "face_detection_full_range_sparse", "face_detection_short_range", "kws_ref_model", "kws_ref_model_float32",
        "pretrainedResnet", "pretrainedResnet_quant",
    ],
)  # fmt: skip
def test_an_unchanged_model_saved_gives_the_same_outputs(shared, tmp_path, name):
    path = shared / "models" / f"{name}.tflite"
    load(path).save(tmp_path / "again.tflite")
    graph = view(load(path))
    rng = np.random.default_rng(0)
    sample = []
    for tensor in (graph.tensors[t] for t in graph.inputs):
        values = rng.uniform(-1, 1, [max(1, d) for d in tensor.shape])
        sample.append(values.astype(np.float32) if tensor.dtype == "float32" else (values * 100).astype(tensor.dtype))
    before, after = (run(p, sample, kernels="BUILTIN") for p in (path, tmp_path / "again.tflite"))
    assert np.array_equal(before, after)


@pytest.mark.parametrize("recipe", ["dynamic-int8", "int8", "dynamic-int4-block32"])
def test_the_same_input_and_recipe_give_the_same_bytes(tmp_path, recipe):
    first = quick(recipe).model.to_bytes()
    optimize(model_path(), recipe, images(), output=tmp_path / "out.tflite", verified=False)
    assert (tmp_path / "out.tflite").read_bytes() == first
    assert optimize(model_path().read_bytes(), recipe, images(), verified=False).model.to_bytes() == first


@pytest.mark.parametrize("recipe", ["int8", "int4-int8"])
def test_saved_statistics_give_the_same_bytes_as_the_data(tmp_path, recipe):
    first = quick(recipe)
    first.statistics.save(tmp_path / "kept.npz")
    again = optimize(model_path(), recipe, statistics=tmp_path / "kept.npz", verified=False)
    assert again.model.to_bytes() == first.model.to_bytes()
    assert again.report.samples == first.report.samples == 12


def test_a_bound_that_is_missed_leaves_no_file(tmp_path):
    with pytest.raises(BoundError, match=r"output probabilities: expected at most 0 .*Nothing was written") as error:
        optimize(model_path(), "dynamic-int8", images(4), output=tmp_path / "out.tflite", max_error=0)
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_bound_that_is_missed_leaves_the_old_file(tmp_path):
    out = tmp_path / "out.tflite"
    out.write_bytes(b"old")
    with pytest.raises(BoundError):
        optimize(model_path(), "dynamic-int8", images(4), output=out, max_error=0, overwrite=True)
    assert out.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [out]


def test_an_output_that_exists_is_replaced_only_when_asked(tmp_path):
    out = tmp_path / "out.tflite"
    out.write_bytes(b"old")
    with pytest.raises(InputError, match=r"the output exists for .*Say --overwrite"):
        optimize(model_path(), output=out, verified=False)
    assert out.read_bytes() == b"old"
    optimize(model_path(), output=out, verified=False, overwrite=True)
    assert load(out).subgraphs


def test_the_input_itself_can_be_replaced(tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(model_path().read_bytes())
    result = optimize(path, "dynamic-int8", output=path, overwrite=True, verified=False)
    assert path.read_bytes() == quick("dynamic-int8").model.to_bytes() == result.model.to_bytes()


def test_optimizing_changes_neither_the_source_nor_its_file():
    model, before = load(model_path()), model_path().read_bytes()
    optimize(model, "int8", images(), verified=False)
    assert model.to_bytes() == load(before).to_bytes()
    assert model_path().read_bytes() == before


def test_strict_refuses_to_leave_a_float_operator(tmp_path):
    with pytest.raises(
        BoundError, match=r"operators would stay float: expected none \(--strict\), got .*has no weights"
    ) as error:
        optimize(model_path(), "dynamic-int8", output=tmp_path / "out.tflite", strict=True, verified=False)
    assert error.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    optimize(model_path(), "int8", images(), strict=True, verified=False)


def test_not_a_number_is_within_no_bound():
    with pytest.raises(BoundError, match=r"the result differs too much for output y: .*got nan"):
        judge(Verification(difference={"y": float("nan")}), 1e9)


def test_numbers_that_json_has_no_words_for_become_null():
    found = Verification(difference={"y": float("nan"), "z": np.float64("inf"), "ok": 0.5})
    facts = json.loads(to_json(replace(quick("dynamic-int8").report, verification=found)))
    assert facts["verification"]["difference"] == {"y": None, "z": None, "ok": 0.5}


def test_made_up_samples_are_said_to_be_made_up():
    assert not optimize(model_path(), "weight-only-int8").report.verification.given


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_integer_weights_of_hybrid_operators_keep_their_codes_in_a_static_model(granularity):
    calibration = load_digits()[0][:32]
    only_dense = Recipe.named("dynamic-int8").with_settings(granularity=granularity).restricted(only=["dense"])
    hybrid = optimize(model_path(), only_dense, verified=False).model
    result = optimize(hybrid.to_bytes(), "int8", calibration)
    assert {row.mode for row in result.report.rows} == {"static"}
    assert result.report.verification is not None
    assert max(result.report.verification.difference.values()) < 0.02

    def codes(model):
        graph = model.graph
        return [t.weight.read() for op in graph.ops if op.kind == "dense" for _, t in graph.weights_of(op)]

    for before, after in zip(codes(hybrid), codes(result.model), strict=True):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", ["kws_ref_model_float32", "pretrainedResnet"])
def test_static_int8_of_a_reference_model_gives_its_answers(shared, name):
    if name.startswith("kws"):
        with np.load(shared / "data" / "kws_features.npz") as data:
            rows = ((data["x"].astype(np.float32) - data["zero_point"]) * data["scale"]).astype(np.float32)[:64]
    else:
        rows = np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.float32)
    report = optimize(shared / "models" / f"{name}.tflite", "int8", rows).report
    assert {row.mode for row in report.rows} == {"static"}
    assert report.verification is not None
    assert max(report.verification.difference.values()) < 0.15
