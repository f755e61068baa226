"""SavedModels for paring's own operators: int8, int4 in blocks, without zeros; stages before quantization; from training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import pytest
import saved_models as models

import paring
from paring.errors import InputError, UnsupportedError
from paring.formats.saved_model.bundle import Bundle
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.packed import INT4, SPARSE_FLOAT32, SPARSE_INT8, unpack
from paring.formats.saved_model.scope import NATIVE
from paring.formats.saved_model.view import view

KINDS = models.KINDS
LOADERS = {"v2": models.run_v2, "v1": models.run_v1}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """TensorFlow deprecates what its own loaders call, and what Keras 3 calls of NumPy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, keras_on_tensorflow: ModuleType, operators: ModuleType) -> Path:
    """A folder with a model of each of `KINDS`."""
    import tensorflow as tf

    return models.every_kind(keras_on_tensorflow, tf, tmp_path_factory.mktemp("native"))


def optimized(source: Path, out: Path, recipe: object, runtime: str = "native", **settings: Any) -> paring.Result:
    """Without running it in children: the tests run it themselves."""
    return paring.optimize(source, recipe, output=out, verified=False, runtime=runtime, **settings)  # type: ignore[arg-type]


def recipe(*stages: dict[str, Any], kind: str = "*") -> dict[str, Any]:
    return {"version": 1, "rules": [{"kind": kind, "apply": list(stages) if len(stages) > 1 else stages[0]}]}


def quantize(weights: str = "int8", activations: str = "float", **settings: Any) -> dict[str, Any]:
    return {"quantize": {"weights": weights, "activations": activations, **settings}}


def rows(result: paring.Result) -> dict[str, tuple[str, str]]:
    return {row.name: (row.became, row.reason) for row in result.report.rows}


def gap(expected: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> float:
    """The largest relative difference of an output."""
    assert expected.keys() == got.keys()
    pairs = [(value, got[name]) for name, value in expected.items() if value.dtype.kind == "f"]
    return max(float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in pairs)


def used(path: Path) -> list[str]:
    """Names of paring's operators in a folder, without what they begin with."""
    model = SavedModel.open(path)
    nodes = [node for scope in model.flow.scopes.values() for node in scope.nodes]
    return [node.op.removeprefix(NATIVE) for node in nodes if node.op.startswith(NATIVE)]


class Layers:
    """A product of each kind that has a native form, on 64 inputs."""

    SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType(
        {"plain": (64, 48), "turned": (40, 64), "heads": (64, 4, 8), "back": (4, 16, 24), "kernel": (3, 3, 8, 16)}
    )
    CHANNELS: Mapping[str, tuple[int, ...]] = MappingProxyType(
        {"plain": (1,), "turned": (0,), "heads": (1, 2), "back": (2,), "kernel": (3,)}
    )

    def __init__(self, tf: Any, folder: Path) -> None:
        random = np.random.default_rng(5)
        values = {name: models.scaled(random, *shape) for name, shape in self.SHAPES.items()}

        class Net(tf.Module):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                for name, value in values.items():
                    setattr(self, name, tf.Variable(value, name=name))

            @tf.function(input_signature=[tf.TensorSpec([None, 64], name="x")])
            def run(self, x):
                image = tf.reshape(x, [-1, 4, 2, 8])
                return {
                    "plain": tf.matmul(x, self.plain),
                    "turned": tf.matmul(x, self.turned, transpose_b=True),
                    "heads": tf.einsum("bi,ihk->bhk", x, self.heads),
                    "back": tf.einsum("bhk,hko->bo", tf.reshape(x, [-1, 4, 16]), self.back),
                    "kernel": tf.nn.conv2d(image, self.kernel, 1, "SAME"),
                }

        self.net = Net()
        self.tf = tf
        self.save(folder)

    def save(self, folder: Path) -> None:
        self.tf.saved_model.save(self.net, str(folder), signatures=self.net.run)

    def blob(self, folder: Path, name: str) -> np.ndarray:
        return np.asarray(Bundle(folder / "variables" / "variables", name).read(f"{name}/.ATTRIBUTES/VARIABLE_VALUE"))

    def assign(self, name: str, matrix: np.ndarray) -> None:
        """Sets a variable to a matrix [inputs, outputs]."""
        shape, channels = self.SHAPES[name], self.CHANNELS[name]
        order = [*(d for d in range(len(shape)) if d not in channels), *channels]
        values = matrix.reshape([shape[d] for d in order]).transpose(np.argsort(order))
        getattr(self.net, name).assign(values.astype(np.float32))


@pytest.fixture
def layers(tmp_path: Path, tensorflow: ModuleType, operators: ModuleType) -> Layers:
    return Layers(tensorflow, tmp_path / "layers")


# -- int8 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["weight-only-int8", "bf16-int8"])
def test_native_operators_compute_what_stock_ones_do(kind: str, name: str, folder: Path, tmp_path: Path, tensorflow):
    optimized(folder / kind, tmp_path / "portable", name, "portable")
    result = optimized(folder / kind, tmp_path / "native", name)
    expected = models.run_v2(tensorflow, tmp_path / "portable")
    for run in LOADERS.values():
        assert gap(expected, run(tensorflow, tmp_path / "native")) < 1e-5
    became = [row for row in result.report.rows if row.became.endswith(" native")]
    assert len(used(tmp_path / "native")) >= len(became) > 2
    assert not used(tmp_path / "portable")
    sizes = [(tmp_path / path / "saved_model.pb").stat().st_size for path in ("native", "portable")]
    assert sizes[0] < 1.01 * sizes[1]


def test_each_row_says_whether_it_is_native_or_why_not(folder: Path, tmp_path: Path):
    found = rows(optimized(folder / "operators", tmp_path / "out", "bf16-int8"))
    for name in ("Conv2D:kernel", "conv1d:kernel1", "MatMul:a", "MatMul_1:right", "MatMul_2:turned", "MatMul_4:batch"):
        assert found[f"run/{name}"] == ("weight-only bf16-int8 native", "rule 1")
    for name, why in {
        "MatMul_5:batch": "its scales are those of another operator's channels",
        "Conv3D:kernel3": "there is no native Conv3D",
        "depthwise:depth": "there is no native DepthwiseConv2dNative",
        "MatMul_8:left": "its weights are on the left",
    }.items():
        assert found[f"run/{name}"] == ("weight-only bf16-int8", f"rule 1; stock operators: {why}")
    picked = next(row for name, row in found.items() if name.endswith(":columns"))
    assert picked == ("weight-only int8", "rule 1; stock operators: it picks rows")


def test_nothing_is_converted_or_carried_into_loops(folder: Path, tmp_path: Path):
    optimized(folder / "keras", tmp_path / "out", "weight-only-int8", only=["dense", "conv2d"])
    flow = SavedModel.open(tmp_path / "out").flow
    nodes = [node for scope in flow.scopes.values() for node in scope.nodes]
    assert not [node.name for node in nodes if node.op == "Cast" and node.attr["SrcT"].type == 6]
    assert not any(name.startswith("carried_weight") for scope in flow.scopes.values() for name in scope.arguments)


def test_mixed_precision_reads_integers(tmp_path: Path, tensorflow, operators):
    tf, random = tensorflow, np.random.default_rng(0)

    class Mixed(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(models.scaled(random, 64, 48), name="w")
            self.heads = tf.Variable(models.scaled(random, 48, 4, 8), name="heads")

        @tf.function(input_signature=[tf.TensorSpec([None, 64], name="x")])
        def run(self, x):
            y = tf.matmul(tf.cast(x, tf.bfloat16), tf.cast(self.w, tf.bfloat16))
            y = tf.matmul(y, tf.reshape(tf.cast(self.heads, tf.bfloat16), [48, 32]))
            return {"y": tf.cast(y, tf.float32)}

    module = Mixed()
    tf.saved_model.save(module, str(tmp_path / "mixed"), signatures=module.run)
    expected = models.run_v2(tf, tmp_path / "mixed")
    for runtime in ("portable", "native"):
        result = optimized(tmp_path / "mixed", tmp_path / runtime, "weight-only-int8", runtime)
        assert 0 < gap(expected, models.run_v2(tf, tmp_path / runtime)) < 0.03
    assert {row.became for row in result.report.rows if row.weight_bytes} == {"weight-only int8 native"}
    nodes = [node for scope in SavedModel.open(tmp_path / "native").flow.scopes.values() for node in scope.nodes]
    products = [node for node in nodes if node.op.startswith(NATIVE)]
    assert {node.attr["T"].type for node in products} == {14}
    assert len([node for node in nodes if node.op == "Cast"]) == 2  # of what comes in and what goes out


SUMS = {  # equation: shapes of both operands; the second is the weight, but in one case
    "bti,ihk->bthk": ((None, None, 24), (24, 4, 8)),  # two dynamic dimensions
    "ihk,bti->bthk": ((24, 4, 8), (None, None, 24)),
    "...i,io->...o": ((None, 3, None, 24), (24, 16)),
    "bthk,hko->bto": ((None, None, 4, 8), (4, 8, 20)),
    "bi,oi->bo": ((None, 24), (16, 24)),
    "bhk,hkop->bop": ((None, 4, 8), (4, 8, 5, 6)),
    "i,io->o": ((24,), (24, 16)),
    "bhk,kho->bo": ((None, 4, 8), (8, 4, 20)),  # in another order
    "tbi,bio->tbo": ((5, 2, 24), (2, 24, 16)),  # a batch of products
    "ab,bc->ca": ((None, 24), (24, 20)),
}
STOCK = {"int8": ("bhk,kho->bo", "tbi,bio->tbo", "ab,bc->ca"), "int4": ("tbi,bio->tbo", "ab,bc->ca")}


@pytest.mark.parametrize("form", STOCK)
def test_einsum_is_native_where_it_is_a_matrix_product(form: str, tmp_path: Path, tensorflow, operators):
    tf, random = tensorflow, np.random.default_rng(0)
    weights = {sum_: int(not sum_.startswith("ihk")) for sum_ in SUMS}
    specs = [tf.TensorSpec(pair[1 - weights[sum_]], name=f"x{n}") for n, (sum_, pair) in enumerate(SUMS.items())]

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = [tf.Variable(models.scaled(random, *pair[weights[sum_]])) for sum_, pair in SUMS.items()]

        @tf.function(input_signature=specs)
        def run(self, *xs):
            pairs = ((x, w) if weights[sum_] else (w, x) for sum_, x, w in zip(SUMS, xs, self.w, strict=True))
            return {f"y{n}": tf.einsum(sum_, *pair) for n, (sum_, pair) in enumerate(zip(SUMS, pairs, strict=True))}

    net = Net()
    tf.saved_model.save(net, str(tmp_path / "net"), signatures=net.run)
    result = optimized(tmp_path / "net", tmp_path / "out", f"weight-only-{form}")
    assert sum(row.became.endswith(" native") for row in result.report.rows) == len(SUMS) - len(STOCK[form])
    expected = models.run_v2(tf, tmp_path / "net")
    for run in LOADERS.values():
        assert 0 < gap(expected, run(tf, tmp_path / "out")) < (0.02 if form == "int8" else 0.15)


# -- int4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loader", LOADERS)
def test_int4_is_packed_in_blocks(loader: str, layers: Layers, tmp_path: Path, tensorflow):
    result = optimized(tmp_path / "layers", tmp_path / "out", "weight-only-int4")
    assert {row.became for row in result.report.rows if row.weight_bytes} == {"weight-only int4 native"}
    loaded = tensorflow.saved_model.load(str(tmp_path / "out"))
    for name, shape in layers.SHAPES.items():
        blob = layers.blob(tmp_path / "out", name)
        assert blob.shape == getattr(loaded, name).shape and blob.dtype == np.int8
        assert blob.nbytes <= 0.15 * 4 * np.prod(shape) + 128
        found = unpack(blob)
        assert (found.kind, found.block) == (INT4, 32) and found.scales is not None
        assert found.kernel == ((3, 3) if name == "kernel" else (1, 1))
        depth = len(found.weights)
        values = found.weights * np.repeat(found.scales.astype(np.float32), 32, 0)[:depth]
        before = getattr(layers.net, name).numpy()
        layers.assign(name, values)
        assert 0.03 < np.linalg.norm(getattr(layers.net, name).numpy() - before) / np.linalg.norm(before) < 0.12
    layers.save(tmp_path / "decoded")
    expected = models.run_v2(tensorflow, tmp_path / "decoded")
    assert gap(expected, LOADERS[loader](tensorflow, tmp_path / "out")) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_int4_in_functions_loops_and_both_loaders(kind: str, folder: Path, tmp_path: Path, tensorflow):
    optimized(folder / kind, tmp_path / "out", "weight-only-int4")
    assert any(op.startswith("Packed") for op in used(tmp_path / "out"))
    expected = models.run_v2(tensorflow, folder / kind)
    found = [run(tensorflow, tmp_path / "out") for run in LOADERS.values()]
    assert gap(*found) < 1e-6 and 0.01 < gap(expected, found[0]) < 0.3


def test_int4_becomes_int8_where_a_reader_cannot_have_it(folder: Path, tmp_path: Path):
    found = rows(optimized(folder / "operators", tmp_path / "out", "weight-only-int4"))
    for name, why in {
        "MatMul_4:batch": "MatMul_4: its weights are a batch of matrices",
        "einsum/Einsum:heads": "it is read in two ways",
        "Gather:table": "Gather: it picks rows",
        "depthwise:depth": "depthwise: there is no native DepthwiseConv2dNative",
    }.items():
        became, reason = found[f"run/{name}"]
        assert became.removesuffix(" native") == "weight-only int8"
        assert reason.startswith(f"rule 1; {why}, int8 instead")


@pytest.mark.parametrize("factor", [1e-9, 1.0, 1e7])
def test_int4_scales_of_any_size_fit(factor: float, layers: Layers, tmp_path: Path, tensorflow):
    for name in layers.SHAPES:
        variable = getattr(layers.net, name)
        variable.assign(variable * factor)
    layers.save(tmp_path / "scaled")
    optimized(tmp_path / "scaled", tmp_path / "out", "weight-only-int4")
    assert gap(models.run_v2(tensorflow, tmp_path / "scaled"), models.run_v2(tensorflow, tmp_path / "out")) < 0.15


def test_what_is_cast_for_others_as_well_is_not_packed(tmp_path: Path, tensorflow, operators):
    tf = tensorflow

    class Mixed(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = tf.Variable(models.scaled(np.random.default_rng(0), 64, 48), name="w")

        @tf.function(input_signature=[tf.TensorSpec([None, 64], name="x")])
        def run(self, x):
            w = tf.cast(self.w, tf.bfloat16)
            return {"y": tf.cast(tf.matmul(tf.cast(x, tf.bfloat16), w) + tf.reduce_max(w), tf.float32)}

    module = Mixed()
    tf.saved_model.save(module, str(tmp_path / "mixed"), signatures=module.run)
    result = optimized(tmp_path / "mixed", tmp_path / "out", "weight-only-int4")
    said = ("weight-only int8 native", "rule 1; something else reads it, too, int8 instead")
    assert rows(result)["run/MatMul:w"] == said
    assert gap(models.run_v2(tf, tmp_path / "mixed"), models.run_v2(tf, tmp_path / "out")) < 0.02


# -- zeros and clusters ----------------------------------------------------------------------------------------------

PRUNED = {"sparsify": {"sparsity": 0.9, "pattern": "8x1"}}


@pytest.mark.parametrize(
    ("last", "packed", "became", "near"),
    [
        ((), SPARSE_FLOAT32, "float sparse native", 1e-5),
        ((quantize(),), SPARSE_INT8, "weight-only sparse int8 native", 1e-5),
        ((quantize(activations="bfloat16"),), SPARSE_INT8, "weight-only bf16 x sparse int8 native", 1e-5),
        ((quantize(activations="dynamic"),), SPARSE_INT8, "weight-only dynamic sparse int8 native", 0.02),
    ],
)
def test_zeros_are_left_out(
    last: tuple[Any, ...], packed: int, became: str, near: float, layers: Layers, tmp_path: Path, tensorflow
):
    wanted = recipe(PRUNED, *last)
    dense = optimized(tmp_path / "layers", tmp_path / "portable", wanted, "portable")
    result = optimized(tmp_path / "layers", tmp_path / "native", wanted)
    assert any("stock TensorFlow multiplies with zeros" in note for note in dense.report.notes)
    for row in (row for row in result.report.rows if row.weight_bytes):
        assert row.became == f"{row.sparsity:.1%} zeros (8x1), {became}"
        assert 0.85 < (row.sparsity or 0) < 0.92
    for name, shape in layers.SHAPES.items():
        blob = layers.blob(tmp_path / "native", name)
        found = unpack(blob)
        share = 1 - np.count_nonzero(found.weights) / found.weights.size
        assert found.kind == packed and share > 0.85
        stored = layers.blob(tmp_path / "portable", name)
        assert stored.shape == shape and np.mean(stored == 0) == pytest.approx(share)
        outputs, depth = found.weights.shape
        blocks = found.weights[: outputs // 8 * 8].reshape(-1, 8, depth).astype(bool)
        assert (blocks.any(1) == (blocks.sum(1) > 6)).all()  # zeros come by eight outputs
    expected = models.run_v2(tensorflow, tmp_path / "portable")
    for run in LOADERS.values():
        assert gap(expected, run(tensorflow, tmp_path / "native")) < near


@pytest.mark.parametrize(("share", "activations", "sparse"), [(0.7, "float", False), (0.7, "dynamic", True)])
def test_few_zeros_stay_where_dense_weights_are_less_to_read(
    share: float, activations: str, sparse: bool, layers: Layers, tmp_path: Path
):
    wanted = recipe({"sparsify": {"sparsity": share}}, quantize(activations=activations))
    result = optimized(tmp_path / "layers", tmp_path / "out", wanted)
    found = {row.became.split(", ")[1] for row in result.report.rows if row.weight_bytes}
    assert found == {"weight-only dynamic sparse int8 native" if sparse else "weight-only int8 native"}
    assert {op.startswith("Packed") for op in used(tmp_path / "out")} == {sparse}


def test_a_target_chooses_layers_and_pattern(tmp_path: Path, tensorflow, operators):
    tf, random = tensorflow, np.random.default_rng(0)

    class Net(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large = tf.Variable(models.scaled(random, 512, 512), name="large")
            self.small = tf.Variable(models.scaled(random, 512, 2), name="small")

        @tf.function(input_signature=[tf.TensorSpec([1, 512], name="x")])
        def run(self, x):
            return {"y": tf.matmul(tf.matmul(x, self.large), self.small)}

    net = Net()
    tf.saved_model.save(net, str(tmp_path / "net"), signatures=net.run)
    result = paring.sparsify(
        tmp_path / "net", tmp_path / "out", target="x86-avx512", sparsity=0.9, runtime="native", verified=False,
        data=np.ones((2, 512), np.float32),
    )  # fmt: skip
    large, small = (row for row in result.report.rows if row.weight_bytes)
    assert large.pattern in ("4x1", "8x1", "16x1") and "times as fast" in large.pruning
    assert (small.sparsity, small.became, small.pruning) == (
        None,
        "float",
        "little work: 1.0 times as fast at 90% zeros",
    )
    assert used(tmp_path / "out") == ["PackedMatMul"]


def test_clusters_stay_with_integers(layers: Layers, tmp_path: Path):
    clustered = {"cluster": {"clusters": 4}}
    result = optimized(tmp_path / "layers", tmp_path / "float", recipe(clustered), "portable")
    assert {row.became for row in result.report.rows if row.weight_bytes} == {"4 clusters, float"}
    optimized(tmp_path / "layers", tmp_path / "int8", recipe(clustered, quantize()))
    for name in ("plain", "kernel"):
        for path in ("float", "int8"):
            found = layers.blob(tmp_path / path, name)
            columns = found.reshape(-1, found.shape[-1]).T
            assert max(len(np.unique(column)) for column in columns) <= 4


def test_a_weight_gets_what_its_readers_agree_on(folder: Path, tmp_path: Path):
    result = optimized(folder / "functions", tmp_path / "out", recipe(PRUNED, quantize()), skip=["^words/MatMul:"])
    found = rows(result)
    loop = next(name for name in found if name.endswith("/while/MatMul:shared"))
    said = "shares its weights with words/MatMul:shared, which the recipe treats otherwise"
    assert found[loop][0] == "float" and said in found[loop][1]


def test_an_algorithm_that_splits_operators_is_left_out(layers: Layers, tmp_path: Path):
    result = optimized(tmp_path / "layers", tmp_path / "out", recipe({"low_rank": {"rank": 4}}, quantize()))
    assert rows(result)["run/MatMul:plain"] == (
        "weight-only int8 native",
        "rule 1; no low_rank: one operator would have to become two, which SavedModels do not get",
    )
    with pytest.raises(InputError, match=r"the recipe touches no layer .* got no low_rank"):
        optimized(tmp_path / "layers", tmp_path / "none", recipe({"low_rank": {"rank": 4}}))


@pytest.mark.parametrize(
    ("settings", "runtime", "message"),
    [
        ({"allocation": "error"}, "native", "cannot share zeros out by error in a SavedModel"),
        ({"storage": "sparse"}, "portable", "storage dense: stock operators read no other, got storage sparse"),
    ],
)
def test_what_pruning_cannot_do_here_is_refused(
    settings: dict[str, str], runtime: str, message: str, layers: Layers, tmp_path: Path
):
    with pytest.raises(InputError, match=message):
        optimized(tmp_path / "layers", tmp_path / "out", recipe({"sparsify": {"sparsity": 0.5, **settings}}), runtime)
    assert not (tmp_path / "out").exists()


# -- around it -------------------------------------------------------------------------------------------------------


def test_what_is_written_was_run_and_says_what_it_needs(layers: Layers, tmp_path: Path, capsys, monkeypatch):
    from paring.cli import main

    words = ["paring", "quantize", str(tmp_path / "layers"), "-o", str(tmp_path / "out"), "-r", "bf16-int8"]
    monkeypatch.setattr("sys.argv", [*words, "--runtime", "native", "--json"])
    with pytest.raises(SystemExit, match=r"^0$"):
        main()
    report = json.loads(capsys.readouterr().out)
    assert report["runtime"] == "native" and any("import paring.tensorflow" in note for note in report["notes"])
    assert 0 < report["verification"]["difference"]["plain"] < 0.02
    record = json.loads((tmp_path / "out" / "assets.extra" / "paring.json").read_text(encoding="utf-8"))
    assert record["runtime"] == "native" and "import paring.tensorflow" in record["needs"]
    seen = view(SavedModel.open(tmp_path / "out")).graph
    weights = {op.kind: tensor.weight for op in seen.ops for _, tensor in seen.weights_of(op)}
    assert {kind: weight.stored for kind, weight in weights.items() if weight} == {"matmul": "int8", "conv2d": "int8"}


def test_without_the_library_the_error_says_what_to_do(layers: Layers, tmp_path: Path):
    optimized(tmp_path / "layers", tmp_path / "out", "weight-only-int8")
    program = """
import sys, tensorflow as tf
from paring.formats.saved_model.model import SavedModel
try:
    tf.saved_model.load(sys.argv[1])
except Exception as error:
    print(str(error).replace("\\n", " "))
try:
    SavedModel.open(sys.argv[1])
except Exception as error:
    print(error)
"""
    environment = os.environ | {"PARING_TENSORFLOW_LIBRARY": str(tmp_path / "absent.so")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path / "out")], env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    stock, ours = done.stdout.splitlines()
    assert "ImportParingTensorflow>" in stock
    assert ours.startswith("the SavedModel has paring's operators for ")
    assert "absent.so" in ours and "--runtime portable" in ours


def test_runtimes_that_make_no_sense_are_refused(layers: Layers, tmp_path: Path):
    with pytest.raises(InputError, match="there is no choice of runtimes for runtime native"):
        paring.optimize(paring.demo.model_path(), output=tmp_path / "out.tflite", runtime="native")
    with pytest.raises(InputError, match="no such runtime for --runtime: expected portable or native, got 'fast'"):
        optimized(tmp_path / "layers", tmp_path / "out", "weight-only-int8", "fast")
    optimized(tmp_path / "layers", tmp_path / "out", "weight-only-int8")
    with pytest.raises(UnsupportedError, match=r"got paring's own\. Take the float model"):
        paring.load(tmp_path / "out")


# -- from training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((32, 8, 8, 3)).astype(np.float32)


def trained(keras: Any, wanted: object, x: np.ndarray) -> Any:
    """A network whose convolution folds a batch normalization, behind a step of training."""
    layers = keras.layers
    keras.utils.set_random_seed(1)
    y = inputs = keras.Input((8, 8, 3), name="image")
    y = layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(32, 3, use_bias=False, name="stem")(y)))
    y = layers.Dense(32, activation="relu", name="middle")(layers.Reshape((9, 128))(y))
    model = keras.Model(inputs, layers.Dense(32, name="head")(layers.Flatten()(y)))
    model.compile("adam", "mse")
    paring.attach(model, wanted, x)
    model.fit(x, np.ones((len(x), 32), np.float32), verbose=0)
    return model


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("stages", "became"),
    [
        ((quantize("int8", "bfloat16"),), "weight-only bf16-int8 native"),
        ((quantize("int4", "bfloat16"),), "weight-only bf16-int4 native"),
        (({"sparsify": {"sparsity": 0.9}}, quantize("int8", "float")), "weight-only sparse int8 native"),
    ],
)
def test_trained_models_keep_their_grids_and_roundings(
    stages: tuple[Any, ...], became: str, data: np.ndarray, tmp_path: Path, keras_on_tensorflow, operators
):
    import tensorflow as tf

    model = trained(keras_on_tensorflow, recipe(*stages), data)
    before, shown = model.get_weights(), model.predict(data, verbose=0)
    for runtime in ("portable", "native"):
        verified = became.startswith("weight-only bf16-int8") and runtime == "native"
        result = paring.export(
            model, tmp_path / runtime, data[:4] if verified else None, runtime=runtime, verified=verified
        )
        if verified:
            assert result.report.verification is not None
            assert max(result.report.verification.difference.values()) < 1e-5
        found = tf.saved_model.load(str(tmp_path / runtime)).signatures["serving_default"](image=data)["output_0"]
        # Two orders of the same sum may be rounded to two neighbours in bfloat16.
        assert np.linalg.norm(found - shown) < 1e-3 * np.linalg.norm(shown)
        names = {row.name.split("/")[0] for row in result.report.rows if row.weight_bytes}
        assert names == {"stem", "middle", "head"}
        variables = SavedModel.open(tmp_path / runtime).flow.sources.values()
        assert not any("paring_state" in source.name for source in variables)
    assert {row.became for row in result.report.rows if row.weight_bytes} == {became}
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_integer_activations_are_not_exported_to_a_savedmodel(data: np.ndarray, tmp_path: Path, keras_on_tensorflow):
    model = trained(keras_on_tensorflow, "int8", data)
    with pytest.raises(UnsupportedError, match=r"expected activations float, dynamic or bfloat16, got int8"):
        paring.export(model, tmp_path / "out")
    with pytest.raises(UnsupportedError, match="expected float inputs and outputs, got strict"):
        paring.export(model, tmp_path / "out", strict=True)
    assert not list(tmp_path.iterdir())
