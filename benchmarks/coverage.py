"""Which models can be trained compressed and shipped: one small model per family, four techniques.

Each pair runs in a process of its own: attach, three training steps, save, load in the middle of training, export, int8
inference. Results are kept in the file as they come: what is there is not run again, unless `--again` says so.

    python benchmarks/coverage.py --family MobileNetV2,LSTM --technique qat
    python benchmarks/coverage.py --hub PYTHON    # an interpreter that has KerasHub, for its families
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import argparse
import collections
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import figures
import numpy as np

INT8 = {"quantize": {"weights": "int8", "activations": "int8"}}
SPARSE = {"sparsify": {"sparsity": 0.5}}
CLUSTER: dict[str, Any] = {"cluster": {"clusters": 16}}
TECHNIQUES: dict[str, list[dict[str, Any]]] = {
    "qat": [INT8],
    "pruning": [SPARSE],
    "clustering": [CLUSTER],
    "chain": [SPARSE, CLUSTER, INT8],
}
RESULTS = figures.REPOSITORY / "docs" / "figures" / "coverage.json"
STEPS, BATCH = 3, families.COUNT // 3
LEAST_ZEROS = 0.49  # of all weights; half of an odd number is rounded down
SAME = 1e-4  # of the output's spread: a loaded model computes what the saved one did


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="", help="families, separated by commas; all by default")
    parser.add_argument("--technique", default="", help=f"of {', '.join(TECHNIQUES)}; all by default")
    parser.add_argument("--hub", metavar="PYTHON", help="interpreter with KerasHub; its families are left out without")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--again", action="store_true", help="run what is in the file, too")
    parser.add_argument("--seconds", type=int, default=600, help="limit for one pair")
    parser.add_argument("--child", nargs=2, metavar=("FAMILY", "TECHNIQUE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(attempt(*args.child), default=float))
        return 0
    rows = json.loads(args.results.read_text(encoding="utf-8"))["rows"] if args.results.is_file() else []
    done = {(row["family"], row["technique"]) for row in rows if not args.again}
    for family, technique in wanted(args.family, args.technique):
        hub = families.group(family) == "KerasHub"
        if (family, technique) in done or (hub and not args.hub):
            continue
        row = run(args.hub if hub else sys.executable, family, technique, args.seconds)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        rows = [r for r in rows if (r["family"], r["technique"]) != (family, technique)] + [row]
        write(args.results, rows)
    return 0 if all(row["result"] == "worked" for row in rows) else 1


def wanted(chosen: str, techniques: str) -> Iterator[tuple[str, str]]:
    """The pairs that were asked for; unknown names end the program."""
    for names, known in ((chosen, families.FAMILIES), (techniques, TECHNIQUES)):
        if unknown := [name for name in names.split(",") if name and name not in known]:
            raise SystemExit(f"unknown name for the benchmark: expected {', '.join(known)}, got {', '.join(unknown)}.")
    for family in chosen.split(",") if chosen else families.FAMILIES:
        for technique in techniques.split(",") if techniques else TECHNIQUES:
            yield family, technique


def run(python: str, family: str, technique: str, seconds: int) -> dict[str, Any]:
    """One pair in a child process; the row says why where the process ended without a result."""
    started = time.time()
    command = [python, __file__, "--child", family, technique]
    row = {"group": families.group(family), "family": family, "technique": technique}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {**row, "result": f"not finished in {seconds} s", "seconds": round(time.time() - started)}
    try:
        found = json.loads(done.stdout.strip().rsplit("\n", 1)[-1])
    except ValueError:
        words = (done.stderr.strip().splitlines() or ["no word"])[-1]
        found = {"result": f"ended with {done.returncode}: {words[:300]}"}
    if "trace" in found:
        print(found.pop("trace"), file=sys.stderr)
    return {**row, **found, "seconds": round(time.time() - started)}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """The rows in the order of the families, with the environment of the last one."""
    order = {pair: at for at, pair in enumerate(wanted("", ""))}
    rows = sorted(rows, key=lambda row: order.get((row["family"], row["technique"]), len(order)))
    found = {"environment": figures.environment(), "steps": STEPS, "rows": rows}
    part = path.with_name(f".{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(json.dumps(found, indent=1, default=float) + "\n", encoding="utf-8")
    os.replace(part, path)


# -- in the child --------------------------------------------------------------------------------------------------


def attempt(family: str, technique: str) -> dict[str, Any]:
    """The row of one pair; `at` is the step that failed."""
    warnings.simplefilter("ignore")
    at = ["build"]
    try:
        return {"result": "worked", **_attempt(family, technique, at)}
    except Exception as error:
        words = " ".join(str(error).split())
        return {"result": f"{at[0]}: {type(error).__name__}: {words[:400]}", "trace": traceback.format_exc()}


def _attempt(family: str, technique: str, at: list[str]) -> dict[str, Any]:
    import keras

    import paring
    from paring import training

    case = families.build(family)
    model, x, stages = case.model, case.x, TECHNIQUES[technique]
    parameters = model.count_params()
    at[0] = "attach"
    recipe = {"version": 1, "rules": [{"kind": "*", "apply": stages}]}
    attachment = training.attach(model, recipe, x, steps_per_epoch=STEPS, epochs=1)
    at[0] = "fit"
    if case.loss is not None:
        model.compile(keras.optimizers.SGD(1e-3), case.loss)
    history = model.fit(x, case.y, batch_size=BATCH, epochs=1, verbose=0).history
    if not np.isfinite(history["loss"]).all():
        raise ArithmeticError(f"the loss is {history['loss']}")
    truth = _outputs(model(_tensors(x), training=False))
    with tempfile.TemporaryDirectory(prefix="coverage-") as folder:
        at[0] = "save"
        model.save(Path(folder, "middle.keras"))
        at[0] = "load"
        loaded = training.load_model(Path(folder, "middle.keras"))
        again = _outputs(loaded(_tensors(x), training=False))
        off = max(_distance(a, b) for a, b in zip(truth, again, strict=True))
        if not off <= SAME:
            raise ArithmeticError(f"the loaded model differs by {off:.3g} of the output's spread")
        at[0] = "train on"
        if case.loss is not None:
            loaded.compile(keras.optimizers.SGD(1e-3), case.loss)
        loaded.fit(_first(x, BATCH), _first(case.y, BATCH), batch_size=BATCH, epochs=1, verbose=0)
        at[0] = "export"
        path = Path(folder, "model.tflite")
        result = training.export(model, path)
        at[0] = "run"
        before = _distances(truth, path, x)
        if INT8 not in stages:
            at[0] = "int8"
            result = paring.optimize(path, "int8", x, output=Path(folder, "int8.tflite"))
            path = Path(folder, "int8.tflite")
            at[0] = "run int8"
        after = _distances(truth, path, x)
        at[0] = "promises"
        kept = promises(path, technique)
    floats = collections.Counter((row.native, row.reason) for row in result.report.rows if row.mode == "float")
    return {
        "parameters": parameters,
        "layers": len(attachment.rows),
        "integer": sum(row.mode != "float" for row in result.report.rows),
        "float": [{"operator": name, "count": n, "why": why} for (name, why), n in sorted(floats.items())],
        "notes": list(result.report.notes),
        "off": before,
        "off_int8": after,
        **kept,
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
            zeros, total = zeros + int((values == 0).sum()), total + values.size
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


def _first(x: Any, count: int) -> Any:
    return {name: value[:count] for name, value in x.items()} if isinstance(x, dict) else x[:count]


def _outputs(y: Any) -> list[np.ndarray]:
    """Outputs in the order of their names where they have some, as arrays."""
    if isinstance(y, dict):
        return [np.asarray(y[name], np.float32) for name in sorted(y)]
    return [np.asarray(part, np.float32) for part in (y if isinstance(y, (list, tuple)) else [y])]


def _distance(truth: np.ndarray, got: np.ndarray) -> float:
    """Largest difference over the truth's standard deviation."""
    return float(np.abs(truth - got).max() / max(float(truth.std()), 1e-9))


def _distances(truth: list[np.ndarray], path: Path, x: Any) -> float:
    """The root mean square difference over the standard deviation, the worst output; runs on default kernels.

    Raises:
      ArithmeticError: An output is not finite.
    """
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path), num_threads=1)
    runner = interpreter.get_signature_runner()
    names = list(runner.get_input_details())
    parts = x if isinstance(x, dict) else {names[0]: x}
    found: list[list[np.ndarray]] = [[] for _ in truth]
    count = len(next(iter(parts.values())))
    for at in range(count):
        got = runner(**{name: parts[name][at : at + 1] for name in names})
        for outputs, name in zip(found, sorted(got), strict=True):
            outputs.append(got[name])
    worst = 0.0
    for expected, outputs in zip(truth, found, strict=True):
        whole = np.concatenate(outputs)
        if not np.isfinite(whole).all():
            raise ArithmeticError("an output of the file is not finite")
        error = float(np.sqrt(np.mean((whole - expected) ** 2)))
        worst = max(worst, error / max(float(expected.std()), 1e-9))
    return worst


if __name__ == "__main__":
    sys.exit(main())
