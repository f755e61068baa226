"""Sparse kernels in stock LiteRT, beside XNNPACK running the same pruned model dense.

Both interpreters live in one process and take turns run by run, so that each finds the other's data in the caches. One
thread: CPU time of the thread; two: wall time. `--only WORD` measures the rows whose names hold the word.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pruned

ZEROS = (0.7, 0.8, 0.9)
WORKS: dict[str, tuple[int, int, pruned.Block, str, tuple[float, float, float]]] = {
    # name: kernel (0: dense), size, block of outputs x inputs, type, bars. They were set on an Intel Xeon with 2 MB of L2.
    "FULLY_CONNECTED float32 1024x1024 x4, 16x1": (0, 1024, (16, 1), "float32", (3, 4.6, 8.5)),
    "FULLY_CONNECTED int8 dynamic 2048x2048 x4, 16x4": (0, 2048, (16, 4), "dynamic-int8", (3.1, 4.6, 8.3)),
    "FULLY_CONNECTED float32 2048x2048 x4, unstructured": (0, 2048, (1, 1), "float32", (1.8, 2.7, 5)),
    "CONV_2D 1x1 float32 28x28x256 x4, 16x1": (1, 256, (16, 1), "float32", (2.8, 3.9, 6.2)),
    "CONV_2D 1x1 float32 28x28x256 x4, 4x1": (1, 256, (4, 1), "float32", (2.8, 3.9, 6.2)),
    "CONV_2D 1x1 float32 28x28x256 x4, unstructured": (1, 256, (1, 1), "float32", (1.7, 2.3, 3.5)),
    "CONV_2D 3x3 float32 28x28x256 x4, 4x1": (3, 256, (4, 1), "float32", (4.5, 6, 9.5)),
    "CONV_2D 3x3 float32 28x28x256 x4, unstructured": (3, 256, (1, 1), "float32", (2, 2.8, 4.8)),
    "CONV_2D 1x1 int8 28x28x256 x4, 16x4": (1, 256, (16, 4), "int8", (3.5, 4.8, 7.2)),
}  # fmt: skip
NETWORKS: dict[str, tuple[str, pruned.Block, str, float]] = {
    "MobileNetV1 224 float32, 90 %": ("mobilenet", (16, 1), "float32", 2.4),
    "ResNet-50 float32, 90 %": ("resnet50", (16, 1), "float32", 5),
    "transformer encoder int8 dynamic, 90 %": ("transformer", (16, 4), "dynamic-int8", 3.5),
}
SHARED = (
    "pretrainedResnet",
    "pretrainedResnet_quant",
    "kws_ref_model",
    "kws_ref_model_float32",
    "face_detection_short_range",
)
WARM = 3


def prepared(interpreter: Any) -> Any:
    """Allocated, with made-up inputs, and run."""
    interpreter.allocate_tensors()
    rng = np.random.default_rng(1)
    for detail in interpreter.get_input_details():
        values = rng.standard_normal(detail["shape"]).astype(np.float32)
        if detail["dtype"] != np.float32:
            scale, zero = detail["quantization"]
            bounds = np.iinfo(detail["dtype"])
            values = np.clip(np.round(values / (scale or 1)) + zero, bounds.min, bounds.max).astype(detail["dtype"])
        interpreter.set_tensor(detail["index"], values)
    for _ in range(WARM):
        interpreter.invoke()
    return interpreter


def turns(first: Any, second: Any, seconds: float, wall: bool) -> tuple[float, float, float, float, float]:
    """Median microseconds of both, their ratio, and its quartiles: over pairs of neighbours."""
    clock = time.perf_counter if wall else time.thread_time
    one, two = [], []
    end = time.perf_counter() + seconds
    while len(one) < 20 or (time.perf_counter() < end and len(one) < 2000):
        for interpreter, times in ((first, one), (second, two)):
            start = clock()
            interpreter.invoke()
            times.append(clock() - start)
    a, b = np.array(one), np.array(two)
    low, high = np.percentile(a / b, [25, 75])
    return (
        float(np.median(a)) * 1e6,
        float(np.median(b)) * 1e6,
        float(np.median(a) / np.median(b)),
        float(low),
        float(high),
    )


def clocked(interpreter: Any) -> float:
    """Wall seconds of one run."""
    start = time.perf_counter()
    interpreter.invoke()
    return time.perf_counter() - start


def agreement(dense: Any, sparse: Any) -> str:
    """How far the outputs are apart, for a table."""
    worst, unequal = 0.0, 0
    for a, b in zip(dense.get_output_details(), sparse.get_output_details(), strict=True):
        x, y = dense.get_tensor(a["index"]), sparse.get_tensor(b["index"])
        worst = max(
            worst, float(np.abs(x.astype(np.float64) - y).max() / max(np.abs(x.astype(np.float64)).max(), 1e-30))
        )
        unequal += int((x != y).sum())
    return "bit for bit" if not unequal else f"{worst:.1e} relative"


def typed(path: Path, kind: str, folder: Path) -> Path:
    """The model in a type: float32 as it is, or quantized by paring."""
    if kind == "float32":
        return path
    from dataclasses import replace

    from paring import Recipe, optimize

    out = folder / f"{path.stem}.{kind}.tflite"
    data = None
    if kind == "int8":
        from ai_edge_litert.interpreter import Interpreter

        shape = Interpreter(str(path)).get_input_details()[0]["shape"]
        rng = np.random.default_rng(2)
        data = [rng.standard_normal(shape).astype(np.float32) for _ in range(8)]
    # A chain of layers has int8 inputs and outputs, so that nothing but the layers is timed; a network keeps float ones.
    chain = kind == "int8" and path.stem == "work"
    recipe = replace(Recipe.load(kind), inputs="int8", outputs="int8") if chain else kind
    optimize(str(path), recipe, data, output=str(out), verified=False, overwrite=True)
    return out


def ceiling(kernel: int, block: pruned.Block, zeros: float) -> float:
    """What skipping zeros gives at most beside kernels that run at the machine's peak: the products left (convolutions), or
    the bytes of weights and indices left (one row)."""
    weight = block[0] * block[1] * (1 if block[1] == 4 else 4)
    index = 0 if kernel else 2
    return 1 / ((1 - zeros) * (1 + index / weight))


def predicted(isa: str, kernel: int, size: int, block: pruned.Block, kind: str, zeros: float) -> float:
    """The speed-up that `paring inspect --target x86-ISA` says for one of the layers."""
    from paring.graph import Op
    from paring.targets import predict

    shape, native = ((size, kernel, kernel, size), "CONV_2D") if kernel else ((size, size), "FULLY_CONNECTED")
    op = Op((0, 0), "layer", "conv2d" if kernel else "dense", native, (), ())
    pattern = "unstructured" if block == (1, 1) else f"{block[0]}x{block[1]}"
    return predict(f"x86-{isa}", op, shape, 28 * 28 if kernel else 1, kind, pattern, zeros) or float("nan")


class Bench:
    """Measures pairs and writes rows."""

    def __init__(self, figure: figures.Figures, seconds: float, probe: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.figure, self.seconds = figure, seconds
        self.probe = prepared(Interpreter(str(probe), num_threads=2))
        alone = prepared(Interpreter(str(probe), num_threads=1))
        self.alone = min(clocked(alone) for _ in range(30))

    def both_cores(self, dense: Any, ours: Any, dense_two: Any, two: Any) -> dict[str, Any]:
        """Wall time of dense and of our kernels with one thread, then with two, in turns: each follows a dense run.

        The two processors of a virtual machine may share a core for seconds. So a dense model of XNNPACK's is run with two
        threads before and after each round, and only rounds count in which both of its runs were nearly twice as fast as
        with one thread.
        """
        rounds, good = 0, []
        end = time.perf_counter() + 3 * self.seconds
        while time.perf_counter() < end and len(good) < 300:
            before = clocked(self.probe)
            times = [clocked(interpreter) for interpreter in (dense, ours, dense_two, two)]
            rounds += 1
            if max(before, clocked(self.probe)) < 0.6 * self.alone:
                good.append(times)
        warm = self.bursts(ours, two)
        if len(good) < 10:
            return {
                "ratio, 2 threads": None,
                "2 threads over 1": None,
                "back to back": warm,
                "rounds": f"{len(good)} of {rounds}",
            }
        _, one, other, own = np.array(good).T
        low, high = np.percentile(one / own, [25, 75])
        return {
            "ratio, 2 threads": float(np.median(other) / np.median(own)),
            "2 threads over 1": float(np.median(one) / np.median(own)),
            "spread": f"{low:.2f} to {high:.2f}",
            "back to back": warm,
            "rounds": f"{len(good)} of {rounds}",
        }

    def bursts(self, ours: Any, two: Any) -> float | None:
        """Two threads over one where runs follow each other: the second thread need not be woken, caches are warm."""
        found = []
        end = time.perf_counter() + 2 * self.seconds
        while time.perf_counter() < end and len(found) < 30:
            before = clocked(self.probe)
            medians = [np.median([clocked(interpreter) for _ in range(8)][2:]) for interpreter in (ours, two)]
            if max(before, clocked(self.probe)) < 0.6 * self.alone:
                found.append(medians[0] / medians[1])
        return float(np.median(found)) if len(found) > 3 else None

    def pair(self, table: str, name: str, dense: Path, sparse: Path, bar: float | None = None, **more: Any) -> float:
        from ai_edge_litert.interpreter import Interpreter

        from paring.runtime import litert_interpreter

        one = prepared(Interpreter(str(dense), num_threads=1))
        ours = prepared(litert_interpreter(str(sparse), num_threads=1))
        same = agreement(one, ours) if dense == sparse else ""
        micros, sparse_micros, ratio, low, high = turns(one, ours, self.seconds, wall=False)
        row = dict(
            work=name,
            **more,
            dense_us=micros,
            sparse_us=sparse_micros,
            ratio=ratio,
            quartiles=f"{low:.2f} to {high:.2f}",
        )
        if bar is not None:
            row["bar"] = bar
        two, dense_two = (
            prepared(litert_interpreter(str(sparse), num_threads=2)),
            prepared(Interpreter(str(dense), num_threads=2)),
        )
        row |= self.both_cores(one, ours, dense_two, two)
        self.figure.row(table, **row, outputs=same)
        if bar is not None:
            self.figure.at_least(f"{name}{' ' + more['zeros'] if 'zeros' in more else ''}", ratio, bar)
        label = f"{name}{' ' + more['zeros'] if 'zeros' in more else ''}"
        for column in ("2 threads over 1", "back to back"):
            if sparse_micros > 200 and row[column] is not None:
                self.figure.at_least(
                    f"{label}: 2 threads over 1{', back to back' if column[0] == 'b' else ''}", row[column], 1.7
                )
        return ratio


def main() -> int:
    args = figures.arguments(__doc__, only="", seconds=3.0, isa="")
    if args.isa:
        os.environ["PARING_ISA"] = args.isa
    from paring.runtime.native import isa

    name = "sparse" if not args.isa else f"sparse_{args.isa}"
    figure = figures.Figures(
        name,
        f"XNNPACK dense beside paring's delegate ({isa()}) on the same pruned model, taking turns run by run; microseconds, "
        "one thread by CPU time, two by wall time. Ratios above 1: the delegate is faster.",
    )
    with tempfile.TemporaryDirectory(prefix="sparse-") as folder_name:
        folder = Path(folder_name)
        bench = Bench(figure, args.seconds, pruned.export(pruned.chain(1, 256, 0.0, (1, 1)), folder / "probe.tflite"))
        for work, (kernel, size, block, kind, bars) in WORKS.items():
            if args.only not in work:
                continue
            share = 2 / 3 if args.isa else 1  # XNNPACK cannot be held to a lower instruction set: it runs on its best
            for zeros, bar in zip(ZEROS, bars, strict=True):
                model = pruned.chain(kernel, size, zeros, block)
                path = typed(pruned.export(model, folder / "work.tflite"), kind, folder)
                more = {
                    "ceiling": ceiling(kernel, block, zeros),
                    "predicted": predicted(isa(), kernel, size, block, kind, zeros),
                }
                ratio = bench.pair("layers", work, path, path, bar * share, zeros=f"{zeros:.0%}", **more)
                off = abs(more["predicted"] / ratio - 1)
                figure.at_most(
                    f"{work} {zeros:.0%}: prediction of `paring inspect --target`, share it is off", off, 0.25
                )
        for work, (network, block, kind, bar) in NETWORKS.items():
            if args.only not in work:
                continue
            path = typed(pruned.export(pruned.network(network, 0.9, block), folder / f"{network}.tflite"), kind, folder)
            bench.pair("networks", work, path, path, None if args.isa else bar)
        work = "MobileNetV1 90 % + int8 over dense float32"
        if args.only in work:
            path = pruned.export(pruned.network("mobilenet", 0.9, (16, 4)), folder / "mobilenet4.tflite")
            bench.pair("networks", work, path, typed(path, "int8", folder), None if args.isa else 5.8)
        models = figures.SHARED / "models"
        work = "face_detection_full_range_sparse, as shipped"
        if args.only in work and (models / "face_detection_full_range_sparse.tflite").exists():
            path = models / "face_detection_full_range_sparse.tflite"
            bench.pair("networks", work, path, path, None if args.isa else 1.15)
            share = touched(path, folder, args.seconds)
            most = f"so no more than {1 / (1 - share):.2f}x is to be had by them"
            figure.note(f"{work}: layers with zeros take {share:.0%} of its time, {most}")
        for model in SHARED:
            path = models / f"{model}.tflite"
            if args.only in f"{model}, dense" and path.exists():
                ratio = bench_dense(bench, path)
                figure.at_least(f"{model}, dense: stock over with the delegate", ratio, 0.98)
    figure.note(
        "ceiling: 1 / density for convolutions, whose dense kernels run at the peak of the multipliers on this machine "
        "(float32: 112 of 112 GF/s for 1x1, 105 for 3x3; int8: 206 of 224 G multiply-adds/s); for dense layers with one row "
        "the bytes of weights over those of nonzeros and indices. More is to be had only where the dense kernel is off its "
        "peak, or where pruning moves the weights into a nearer cache."
    )
    figure.note(
        "What bounds the rows below their bars. Dense layers with one row: the third-level cache; XNNPACK reads 4.2 "
        "MB of a layer at 60 to 75 GB/s, we read 0.4 to 1.3 MB at 40 to 55, short streams that start anew for each "
        "layer. Unstructured dense layers: two scalar loads and an FMA for each weight, 0.30 ns; gathers take 0.35, "
        "expanded masks 0.35 to 1.06 (native/bench/one_row.cc prints these). 3x3: 100 to 108 GF/s on the weights "
        "left, dense 106. int8 1x1: bias, requantization and packing are a cost for each output that zeros do not "
        "shrink. Transformer: with the delegate it takes 4.2 ms, of which its 36 dense layers are 1.15 (verbose "
        "prints them); the other 3.1 of 9.4 ms have no constant weights, so 3.0x is the end."
    )
    figure.note(
        "Two threads: a thread that slept takes 30 to 80 us to begin here, a tenth to a fifth of rows of 400 to 800 "
        "us; back to back there is nothing to wake. Layers of less than 80 us run on one thread. In whole networks "
        "XNNPACK's parts and ours take turns, and each wakes its own threads."
    )
    return figure.finish(args.write)


def touched(path: Path, folder: Path, seconds: float) -> float:
    """Share of a model's time in stock LiteRT that its layers with zeros take: run alone, side by side, over the whole."""
    from ai_edge_litert.interpreter import Interpreter

    from paring.formats import load
    from paring.formats.tflite.extract import islands
    from paring.formats.tflite.view import view

    model = load(path)
    graph = view(model, densify=True)
    cuts = []
    for op in graph.ops:
        weights = [t.weight.read() for _, t in graph.weights_of(op) if t.weight and op.kind in ("conv2d", "dense")]
        if any((w == 0).mean() > 0.5 for w in weights):
            cuts.append(([op.inputs[0][1]], [op.outputs[0][1]]))
    alone = folder / "alone.tflite"
    islands(model, 0, cuts).save(alone)
    part, whole = prepared(Interpreter(str(alone), num_threads=1)), prepared(Interpreter(str(path), num_threads=1))
    return turns(part, whole, seconds, wall=False)[2]


def bench_dense(bench: Bench, path: Path) -> float:
    """A dense model: nothing is claimed, and nothing may get slower."""
    from ai_edge_litert.interpreter import Interpreter

    from paring.runtime import litert_interpreter

    one = prepared(Interpreter(str(path), num_threads=1))
    ours = prepared(litert_interpreter(str(path), num_threads=1))
    micros, sparse_micros, ratio, low, high = turns(one, ours, 2 * bench.seconds, wall=False)
    bench.figure.row(
        "dense models", model=path.stem, stock_us=micros, delegate_us=sparse_micros, ratio=ratio,
        quartiles=f"{low:.2f} to {high:.2f}", outputs=agreement(one, ours),
    )  # fmt: skip
    return ratio


if __name__ == "__main__":
    sys.exit(main())
