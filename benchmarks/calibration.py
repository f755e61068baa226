"""Calibrating ResNet8 on 500 samples: time, and how true the ranges are, beside the official quantizer.

Time is given three ways: a fresh process from start to end (interpreter, imports, reading data, calibrating); the
calibration alone, our child process' start included; and ours once the child runs; CPU seconds of the process beside
them. Theirs calibrates a model without a signature not at all, so it gets the same file with one that our writer added.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cifar
import figures
import numpy as np

MODEL = figures.SHARED / "models" / "pretrainedResnet.tflite"
SIDES = ("ours", "official, all tensors", "official, profiler")


def signed(target: Path) -> None:
    """The model with a signature."""
    from paring import load
    from paring.formats.tflite.flatbuffer import Table

    model = load(MODEL)
    graph = model.subgraphs[0]
    entry = Table(
        "SignatureDef",
        signature_key="serving_default",
        subgraph_index=0,
        inputs=[Table("TensorMap", name="x", tensor_index=int(graph.inputs[0]))],
        outputs=[Table("TensorMap", name="y", tensor_index=int(graph.outputs[0]))],
    )
    model.root.signature_defs = [entry]
    model.save(target)


def ours(source: Path, data: Path) -> dict[str, Any]:
    from paring import Recipe, load
    from paring import calibrate as calibrate_module
    from paring.calibrate import calibrate
    from paring.data import feeds
    from paring.formats.tflite.view import view
    from paring.plan import plan
    from paring.runtime import Worker
    from paring.solve import requests

    started: list[float] = []

    class Timed(Worker):
        def load(self, *arguments: Any, **named: Any) -> None:
            super().load(*arguments, **named)
            started.append(time.perf_counter())

    calibrate_module.Worker = Timed  # type: ignore[misc]
    start = time.perf_counter()
    model = load(source)
    graph = view(model, fold_ranges=True)
    wanted = requests(plan(graph, Recipe.named("int8")))
    found = calibrate(model, graph, wanted, feeds(model, np.load(data, mmap_mode="r")))
    end = time.perf_counter()
    ranges = {found.names[t]: (s.low, s.high) for t, s in found.tensors.items()}
    return {"calibrate_s": end - start, "without_start_s": end - started[-1], "ranges": ranges}


def official(source: Path, data: Path, mode: str) -> dict[str, Any]:
    from litert_quantizer import calibrator, quantizer, recipe

    samples = np.load(data, mmap_mode="r")
    start = time.perf_counter()
    made = quantizer.Quantizer(str(source), recipe.static_wi8_ai8())
    chosen = getattr(calibrator.CalibrationMode, mode)
    found = made.calibrate({"serving_default": [{"x": sample[None]} for sample in samples]}, mode=chosen)
    took = time.perf_counter() - start
    ranges = {k: (float(np.min(v["min"])), float(np.max(v["max"]))) for k, v in found.items() if v and "min" in v}
    return {"calibrate_s": took, "without_start_s": took, "ranges": ranges}


def child(side: str, source: Path, data: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--source", str(source), "--data", str(data)]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    took, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    if done.returncode:
        raise RuntimeError(f"{side} failed: {done.stderr[-2000:]}")
    return {**json.loads(done.stdout.splitlines()[-1]), "process_s": took, "process_cpu_s": cpu}


def true_ranges(source: Path, samples: np.ndarray) -> dict[str, tuple[float, float]]:
    """Plain minimum and maximum of every float tensor over all samples: the interpreter keeps them all."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(source), experimental_preserve_all_tensors=True)
    interpreter.allocate_tensors()
    start = interpreter.get_input_details()[0]["index"]
    tensors = {d["index"]: d["name"] for d in interpreter.get_tensor_details() if d["dtype"] is np.float32}
    low, high = dict.fromkeys(tensors, np.inf), dict.fromkeys(tensors, -np.inf)
    for sample in samples:
        interpreter.set_tensor(start, sample[None])
        interpreter.invoke()
        for index in tensors:
            try:
                values = interpreter.get_tensor(index)
            except ValueError:  # inside what a delegate took
                continue
            low[index], high[index] = min(low[index], float(values.min())), max(high[index], float(values.max()))
    return {name: (low[index], high[index]) for index, name in tensors.items() if low[index] <= high[index]}


def off(ranges: dict[str, Any], true: dict[str, tuple[float, float]]) -> tuple[float, float, int]:
    """Largest and median distance of an end of a range from the true one, as a share of the true width; tensors."""
    shares = []
    for name in ranges.keys() & true.keys():
        (a, b), (low, high) = ranges[name], true[name]
        shares.append(max(abs(a - low), abs(b - high)) / max(high - low, 1e-9))
    return max(shares), statistics.median(shares), len(shares)


def main() -> int:
    args = figures.arguments(__doc__, rounds=5, samples=500, side="", source="", data="")
    if args.side:
        source, data = Path(args.source), Path(args.data)
        modes = dict(zip(SIDES[1:], ("CALIBRATION_PRESERVE_ALL_TENSORS", "CALIBRATION_PROFILER_BASED"), strict=True))
        found = ours(source, data) if args.side == "ours" else official(source, data, modes[args.side])
        print(json.dumps(found))
        return 0
    figure = figures.Figures(
        "calibration", f"ResNet8, {args.samples} CIFAR-10 training images, static int8; fresh processes, alternating."
    )
    with tempfile.TemporaryDirectory(prefix="calibration-") as folder:
        source, data = Path(folder) / "signed.tflite", Path(folder) / "samples.npy"
        signed(source)
        samples = cifar.images("train", args.samples)
        np.save(data, samples)
        true = true_ranges(source, samples)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number in range(args.rounds):
            for side in SIDES if number % 2 else SIDES[::-1]:
                runs[side].append(child(side, source, data))
        for side, found in runs.items():
            worst, middle, count = off(found[0]["ranges"], true)
            medians = {
                key: statistics.median(run[key] for run in found)
                for key in ("process_s", "process_cpu_s", "calibrate_s", "without_start_s")
            }
            figure.row("time and ranges", side=side, **medians, off_worst=worst, off_median=middle, tensors=count)
        orders = []
        for seed in range(3):
            np.save(data, samples[np.random.default_rng(seed).permutation(len(samples))])
            for side in SIDES[:2]:
                ranges = child(side, source, data)["ranges"]
                worst, middle, count = off(ranges, true)
                figure.row("shuffled", side=side, shuffle=seed, off_worst=worst, off_median=middle, tensors=count)
                if side == "ours":
                    orders.append(ranges)
                    figure.at_most(
                        f"shuffle {seed}: furthest end of a range from the true one, share of its width", worst, 0.01
                    )
    same = all(ranges == runs["ours"][0]["ranges"] for ranges in orders)
    figure.at_least("the same ranges in every order (1 = yes)", float(same), 1)
    for other in SIDES[1:]:
        for key, limit in (("calibrate_s", 5.0), ("process_s", 0.0), ("process_cpu_s", 0.0), ("without_start_s", 0.0)):
            pairs = [b[key] / a[key] for a, b in zip(runs["ours"], runs[other], strict=True)]
            ratio = statistics.median(pairs)
            figure.row("times faster, median of pairs", other=other, time=key, ratio=ratio)
            if limit:
                figure.at_least(f"times faster than {other}, our child's start included", ratio, limit)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
