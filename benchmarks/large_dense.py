"""400 MB of FULLY_CONNECTED weights to dynamic int8: time and peak memory beside the official quantizer.

Each side runs in a fresh child process, alternating. Timed: from the path of the float file to the written int8 file
(load, plan, encode, save; theirs: Quantizer, quantize, export_model). Imports are not timed on either side. Peak memory
is VmHWM of the whole process, imports and pages of the mapped source included.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import figures
import numpy as np

LAYERS, WIDTH = 6, 4096


def make(path: Path, layers: int, width: int) -> None:
    """A chain of FULLY_CONNECTED layers with normal weights, written by our own writer."""
    from paring.formats.tflite.flatbuffer import Table
    from paring.formats.tflite.model import TfliteModel, operator_code
    from paring.formats.tflite.schema import ENUMS

    rng = np.random.default_rng(0)
    shape = np.array([1, width], np.int32)
    buffers, operators = [Table("Buffer")], []
    tensors = [Table("Tensor", name="x", shape=shape, type=0, buffer=0)]
    for layer in range(layers):
        values = rng.standard_normal((width, width), np.float32) / np.float32(width**0.5)
        weight, bias = len(buffers), len(buffers) + 1
        buffers += [Table("Buffer", data=d.view(np.uint8)) for d in (values.reshape(-1), np.zeros(width, np.float32))]
        start = len(tensors)
        square = np.array([width, width], np.int32)
        tensors += [
            Table("Tensor", name=f"layer{layer}/w", shape=square, type=0, buffer=weight),
            Table("Tensor", name=f"layer{layer}/b", shape=shape[1:], type=0, buffer=bias),
            Table("Tensor", name=f"layer{layer}", shape=shape, type=0, buffer=0),
        ]
        operators.append(
            Table(
                "Operator",
                opcode_index=0,
                inputs=np.array([start - 1, start, start + 1], np.int32),
                outputs=np.array([start + 2], np.int32),
                builtin_options_type=ENUMS["BuiltinOptions"]["FullyConnectedOptions"],
                builtin_options=Table("FullyConnectedOptions"),
            )
        )
    graph = Table(
        "SubGraph", tensors=tensors, operators=operators, inputs=np.zeros(1, np.int32),
        outputs=np.array([len(tensors) - 1], np.int32),
    )  # fmt: skip
    codes = [operator_code("FULLY_CONNECTED", 1)]
    root = Table(
        "Model", version=3, operator_codes=codes, subgraphs=[graph], buffers=buffers, description="large dense"
    )
    TfliteModel(root, memoryview(b""), str(path)).save(path)


def ours(source: Path, target: Path, verified: bool) -> dict[str, float]:
    from paring import optimize

    start = time.perf_counter()
    result = optimize(source, "dynamic-int8", output=target, overwrite=True, verified=verified)
    took = time.perf_counter() - start
    return {"seconds": took, **{f"{name}_s": value for name, value in result.report.seconds.items()}}


def theirs(source: Path, target: Path) -> dict[str, float]:
    from litert_quantizer import quantizer, recipe

    start = time.perf_counter()
    made = quantizer.Quantizer(str(source), recipe.dynamic_wi8_afp32())
    made.quantize().export_model(str(target), overwrite=True)
    return {"seconds": time.perf_counter() - start}


def peak() -> float:
    """Peak resident memory of this process in MB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def child(side: str, source: Path, target: Path) -> dict[str, float]:
    """One side once, in a process of its own."""
    target.unlink(missing_ok=True)
    command = [sys.executable, __file__, "--side", side, "--source", str(source), "--target", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    args = figures.arguments(__doc__, rounds=7, layers=LAYERS, width=WIDTH, side="", source="", target="", folder="")
    if args.side:
        source, target = Path(args.source), Path(args.target)
        found = theirs(source, target) if args.side == "theirs" else ours(source, target, args.side == "verified")
        print(json.dumps({**found, "peak_mb": peak()}))
        return 0
    megabytes = args.layers * args.width**2 * 4 / 1e6
    figure = figures.Figures(
        "large_dense",
        f"{args.layers} FULLY_CONNECTED {args.width}x{args.width} ({megabytes:.0f} MB of float32) to dynamic int8; "
        f"fresh processes, alternating, {args.rounds} rounds, file in the page cache; imports are timed on neither side.",
    )
    with tempfile.TemporaryDirectory(prefix="large-", dir=args.folder or None) as folder:
        source, target = Path(folder) / "float.tflite", Path(folder) / "int8.tflite"
        make(source, args.layers, args.width)
        source.read_bytes()
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for number in range(args.rounds):
            for side in ("ours", "theirs") if number % 2 else ("theirs", "ours"):
                runs[side].append(child(side, source, target))
                figure.row("runs", round=number, side=side, **runs[side][-1])
                size = target.stat().st_size / 1e6
                figure.tables["runs"][-1]["size_mb"] = size
        verified = child("verified", source, target)
    for side, found in runs.items():
        seconds, peaks = ([run[key] for run in found] for key in ("seconds", "peak_mb"))
        figure.row(
            "summary", side=side, median_s=statistics.median(seconds), fastest_s=min(seconds), slowest_s=max(seconds),
            peak_mb=statistics.median(peaks),
        )  # fmt: skip
    figure.row("our verification, on its own", verify_s=verified["verify_s"], peak_mb=verified["peak_mb"])
    pairs = [a["seconds"] / b["seconds"] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]
    mine, other = (statistics.median(run["peak_mb"] for run in runs[side]) for side in ("ours", "theirs"))
    figure.at_most("time over the official quantizer's, median of pairs", statistics.median(pairs), 1.0)
    figure.at_most("peak memory over the official quantizer's", mine / other, 1.0)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
