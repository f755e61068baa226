"""Which models can be trained compressed and shipped: one small model per family, four techniques.

Each family runs in a process of its own; each technique on a fresh model: attach, three training steps, save, load in the
middle of training, a step more, export, int8 inference. Deep networks train eagerly: compiling takes ten times as long as three
steps (the tests compile). The file must compute what the deployed Keras model does (`AGREE`).
Results are kept as they come: what is there is not run again, unless `--again` says so.

    python benchmarks/coverage.py --family MobileNetV2,LSTM --technique qat
    python benchmarks/coverage.py --hub PYTHON    # an interpreter that has KerasHub, for its families
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import argparse
import collections
import itertools
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families
import figures
import numpy as np

INT8 = {"quantize": {"weights": "int8", "activations": "int8"}}
SPARSE = {"sparsify": {"sparsity": 0.5, "schedule": "polynomial", "end": 2, "every": 1}}
CLUSTER: dict[str, Any] = {"cluster": {"clusters": 16}}
TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "qat": [INT8],
    "pruning": [SPARSE],
    "clustering": [CLUSTER],
    "chain": [SPARSE, CLUSTER, INT8],
}
RESULTS = figures.REPOSITORY / "docs" / "figures" / "coverage.json"
STEPS, BATCH = 3, families.COUNT // 3
RATE = 1e-3
LEAST_ZEROS = 0.49  # of all weights; half of an odd number is rounded down
SAME = 1e-4  # of the output's spread: a loaded model computes what the saved one did
AGREE = 0.1  # root mean square difference of file and deployed Keras model over the output's spread; or one quantum, or twice
# what the builtin kernels make of the file or a millionth of the input of the Keras model, if that is more: deep networks
# with random weights carry single roundings far.
EXACT = 1e-3  # the same for float files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="", help="families, separated by commas; all by default")
    parser.add_argument("--technique", default="", help=f"of {', '.join(TECHNIQUES)}; all by default")
    parser.add_argument("--hub", metavar="PYTHON", help="interpreter with KerasHub; its families are left out without")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--again", action="store_true", help="run what is in the file, too")
    parser.add_argument("--seconds", type=int, default=900, help="limit for one family")
    parser.add_argument("--child", nargs=2, metavar=("FAMILY", "TECHNIQUES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        family, techniques = args.child
        for technique in techniques.split(","):
            print("\n" + json.dumps(attempt(family, technique), default=float), flush=True)
        return 0
    check(args.family, families.FAMILIES)
    check(args.technique, TECHNIQUES)
    rows = json.loads(args.results.read_text(encoding="utf-8"))["rows"] if args.results.is_file() else []
    done = {(row["family"], row["technique"]) for row in rows if not args.again}
    for family in args.family.split(",") if args.family else families.FAMILIES:
        hub = families.group(family) == "KerasHub"
        techniques = args.technique.split(",") if args.technique else list(TECHNIQUES)
        techniques = [technique for technique in techniques if (family, technique) not in done]
        if not techniques or (hub and not args.hub):
            continue
        for row in run(args.hub if hub else sys.executable, family, techniques, args.seconds):
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            rows = [r for r in rows if (r["family"], r["technique"]) != (family, row["technique"])] + [row]
        write(args.results, rows)
    return 0 if all(row["result"] == "worked" for row in rows) else 1


def check(names: str, known: Sequence[str] | dict[str, Any]) -> None:
    """Unknown names end the program."""
    if unknown := [name for name in names.split(",") if name and name not in known]:
        raise SystemExit(f"unknown name for the benchmark: expected {', '.join(known)}, got {', '.join(unknown)}.")


def run(python: str, family: str, techniques: list[str], seconds: int) -> Iterator[dict[str, Any]]:
    """A family in a child process; rows say why where the process ended without a result."""
    command = [python, __file__, "--child", family, ",".join(techniques)]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        tempfile.TemporaryFile("w+", encoding="utf-8") as wrong,
    ):
        try:
            ended = subprocess.run(command, stdout=said, stderr=wrong, timeout=seconds, check=False).returncode
            said.seek(0)
            wrong.seek(0)
            why = f"ended with {ended}: {(wrong.read().strip().splitlines() or ['no word'])[-1][:300]}"
        except subprocess.TimeoutExpired:
            said.seek(0)
            why = f"not finished in {seconds} s"
        found = [json.loads(line) for line in said.read().splitlines() if line.startswith('{"technique"')]
    for technique in techniques:
        row = next((row for row in found if row["technique"] == technique), {"technique": technique, "result": why})
        if "trace" in row:
            print(row.pop("trace"), file=sys.stderr)
        yield {"group": families.group(family), "family": family, **row}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows in the order of the families, with the environment of the last one."""
    order = {pair: at for at, pair in enumerate(itertools.product(families.FAMILIES, TECHNIQUES))}
    rows = sorted(rows, key=lambda row: order.get((row["family"], row["technique"]), len(order)))
    found = {"environment": figures.environment(), "steps": STEPS, "rows": rows}
    part = path.with_name(f".{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(found, indent=1, default=float) + "\n", encoding="utf-8")
    os.replace(part, path)


# -- in the child --------------------------------------------------------------------------------------------------


def attempt(family: str, technique: str) -> dict[str, Any]:
    """The row of one pair; what failed begins with the step at which it did."""
    warnings.simplefilter("ignore")
    clock = Clock()
    found: dict[str, Any] = {"result": "worked"}
    try:
        _attempt(family, technique, clock, found)
    except Exception as error:
        words = " ".join(str(error).split())
        found |= {"result": f"{clock.at}: {type(error).__name__}: {words[:400]}", "trace": traceback.format_exc()}
    clock.step("end")
    return {"technique": technique, **found, "seconds": round(sum(clock.spent.values())), "spent": clock.spent}


@dataclass
class Clock:
    """Which step runs, and what each took in seconds."""

    at: str = "build"
    spent: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.time)

    def step(self, name: str) -> None:
        """The next step begins."""
        self.spent[self.at] = round(time.time() - self.began, 1)
        self.at, self.began = name, time.time()


def _attempt(family: str, technique: str, clock: Clock, found: dict[str, Any]) -> None:
    import keras

    import paring
    from paring import training

    keras.backend.clear_session()
    case = families.build(family)
    model, x, stages = case.model, case.x, TECHNIQUES[technique]
    found["parameters"] = model.count_params()
    clock.step("attach")
    recipe = {"version": 1, "rules": [{"kind": "*", "apply": stages}]}
    training.attach(model, recipe, x, steps_per_epoch=STEPS, epochs=1, momentum=families.MOMENTUM)
    clock.step("fit")
    if case.loss is not None:
        model.compile(keras.optimizers.SGD(RATE, clipnorm=1.0), case.loss)  # deep random networks have huge gradients
    model.run_eagerly = families.group(family) == "keras.applications"
    history = model.fit(x, case.y, batch_size=BATCH, epochs=1, verbose=0).history
    if not np.isfinite(history["loss"]).all():
        raise ArithmeticError(f"the loss is {history['loss']}")
    truth = _outputs(model(_tensors(x), training=False))
    if not all(np.isfinite(part).all() and part.std() > 0 for part in truth):
        raise ArithmeticError("an output of the Keras model is not finite, or the same for all samples")
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        clock.step("save and load")
        model.save(Path(folder, "middle.keras"))
        loaded = training.load_model(Path(folder, "middle.keras"))
        again = _outputs(loaded(_tensors(x), training=False))
        off = max(_off(a, b) for a, b in zip(truth, again, strict=True))
        if not off <= SAME:
            raise ArithmeticError(f"the loaded model differs by {off:.3g} of the output's spread")
        clock.step("train on")
        loaded.run_eagerly = True
        more = loaded.fit(_first(x, BATCH), _first(case.y, BATCH), batch_size=BATCH, verbose=0).history
        if not np.isfinite(more["loss"]).all():
            raise ArithmeticError(f"the loss is {more['loss']}")
        clock.step("export")
        path = Path(folder, "model.tflite")
        result = training.export(model, path, x, verified=False)
        found |= became(result)
        clock.step("run")
        found |= compared(truth, path, x, AGREE if INT8 in stages else EXACT, model)
        if INT8 not in stages:
            clock.step("int8")
            result = paring.optimize(path, "int8", x, output=Path(folder, "int8.tflite"), verified=False)
            path = Path(folder, "int8.tflite")
            found |= became(result)
            clock.step("run int8")
            found |= {f"int8 {key}": value for key, value in compared(truth, path, x, np.inf, model).items()}
        clock.step("promises")
        found |= promises(path, technique)


def became(result: Any) -> dict[str, Any]:
    """What became of the file's operators."""
    floats = collections.Counter((row.native, row.reason) for row in result.report.rows if row.mode == "float")
    return {
        "integer": sum(row.mode != "float" for row in result.report.rows),
        "float": [{"operator": name, "count": n, "why": why} for (name, why), n in sorted(floats.items())],
        "notes": list(result.report.notes),
    }


def promises(path: Path, technique: str) -> dict[str, Any]:
    """What the written file holds of its promises, over operators with weights of rank 2 and more.

    Raises:
      ArithmeticError: Fewer zeros than half, or more values in a channel than clusters.
    """
    import paring
    from paring.formats.tflite.view import view

    graph = view(paring.load(path))
    zeros = total = most = 0
    for op in graph.ops:
        for use, tensor in graph.weights_of(op):
            if tensor.weight is None or len(tensor.shape) < 2:
                continue
            values = np.moveaxis(tensor.weight.read(), use.axis or 0, 0)
            values = values.reshape(len(values), -1)
            grid = tensor.quantization
            zero = np.reshape(grid.zero_point, (-1, 1)) if grid is not None and values.dtype.kind == "i" else 0
            zeros, total = zeros + int((values == zero).sum()), total + values.size
            ordered = np.sort(values, axis=1)
            most = max(most, 1 + int((np.diff(ordered, axis=1) != 0).sum(axis=1).max()))
    found = {"zeros": zeros / total if total else 0.0, "distinct": most}
    if SPARSE in TECHNIQUES[technique] and found["zeros"] < LEAST_ZEROS:
        raise ArithmeticError(f"{found['zeros']:.1%} of the weights in the file are zero")
    if CLUSTER in TECHNIQUES[technique] and most > CLUSTER["cluster"]["clusters"]:
        raise ArithmeticError(f"{most} different weights in one channel of the file")
    return found


def _tensors(x: Any) -> Any:
    return {name: _tensors(value) for name, value in x.items()} if isinstance(x, dict) else np.asarray(x)


def _moved(x: Any) -> Any:
    """Real inputs moved by a millionth: what single roundings make of a deep network with random weights."""
    if isinstance(x, dict):
        return {name: _moved(value) for name, value in x.items()}
    return x * np.float32(1 + 1e-6) if np.asarray(x).dtype.kind == "f" else x


def _first(x: Any, count: int) -> Any:
    return {name: value[:count] for name, value in x.items()} if isinstance(x, dict) else x[:count]


def _outputs(y: Any) -> list[np.ndarray]:
    """Outputs in the order of their names where they have some, as arrays."""
    if isinstance(y, dict):
        return [np.asarray(y[name], np.float32) for name in sorted(y)]
    return [np.asarray(part, np.float32) for part in (y if isinstance(y, (list, tuple)) else [y])]


def _off(truth: np.ndarray, got: np.ndarray) -> float:
    """Root mean square difference over the truth's standard deviation."""
    return float(np.sqrt(np.mean((truth - got) ** 2)) / max(float(truth.std()), 1e-9))


def compared(truth: list[np.ndarray], path: Path, x: Any, bound: float, model: Any) -> dict[str, float]:
    """How near a file on default kernels comes to the Keras model, the worst output.

    Returns:
      `off`: root mean square difference over the output's standard deviation; `within`: share of the values within one step of
      the output's grid, where it has one; where `off` is beyond the bound, `kernels`: that of the builtin kernels from the
      default ones, and `shaken`: that of the Keras model from itself, its inputs moved by a millionth.

    Raises:
      ArithmeticError: An output is not finite, or `off` is beyond the bound, one step, and twice `kernels` and `shaken`.
    """
    found: dict[str, float] = {"off": 0.0}
    got, other = outputs_of(path, x, builtin=False), None
    for number, (expected, (index, whole)) in enumerate(zip(truth, got, strict=True)):
        if not np.isfinite(whole).all():
            raise ArithmeticError("an output of the file is not finite")
        step, off = _step(path, index), _off(expected, whole)
        found["off"] = max(found["off"], off)
        if step:
            share = float((np.abs(whole - expected) < 1.01 * step).mean())
            found["within"] = min(found.get("within", 1.0), share)
        if off <= max(bound, step / max(float(expected.std()), 1e-9)):
            continue
        other = other or outputs_of(path, x, builtin=True)
        kernels = _off(whole, other[number][1])
        shaken = _off(expected, _outputs(model(_tensors(_moved(x)), training=False))[number])
        found["kernels"] = max(found.get("kernels", 0.0), kernels)
        found["shaken"] = max(found.get("shaken", 0.0), shaken)
        if not off <= 2 * max(kernels, shaken):
            near = f"{share:.0%} of the values are within one step" if step else "it has no grid"
            raise ArithmeticError(
                f"the file differs by {off:.3g} of the output's spread from Keras, by {kernels:.3g} between kernels, Keras by "
                f"{shaken:.3g} with its inputs moved by a millionth; {near}"
            )
    return found


def outputs_of(path: Path, x: Any, *, builtin: bool) -> list[tuple[int, np.ndarray]]:
    """The outputs of a file in the order of their names: number of the tensor, and values."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if builtin else OpResolverType.AUTO
    interpreter = Interpreter(model_path=str(path), num_threads=1, experimental_op_resolver_type=kernels)
    runner = interpreter.get_signature_runner()
    names, outputs = list(runner.get_input_details()), runner.get_output_details()
    parts = x if isinstance(x, dict) else {names[0]: x}
    got: dict[str, list[np.ndarray]] = {name: [] for name in outputs}
    for at in range(len(next(iter(parts.values())))):
        for name, value in runner(**{name: parts[name][at : at + 1] for name in names}).items():
            got[name].append(value)
    return [(int(outputs[name]["index"]), np.concatenate(got[name])) for name in sorted(got)]


def _step(path: Path, index: int) -> float:
    """The step of the grid that an output of a file lies on; 0 where it has none."""
    import paring
    from paring.formats.tflite.view import view

    graph = view(paring.load(path))
    last = graph.producers().get((0, index))
    if last is None or last.native != "DEQUANTIZE":
        return 0.0
    quantization = graph.tensors[last.inputs[0]].quantization
    return float(quantization.scale[0]) if quantization is not None else 0.0


if __name__ == "__main__":
    sys.exit(main())
