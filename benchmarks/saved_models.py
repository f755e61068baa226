"""SavedModels: size, errors under both loaders, memory and speed, beside the float model and what else there is.

Beside each other: the float model, what paring writes for stock TensorFlow (portable) and for its own operators (native),
TensorFlow's own `quantize_saved_model` (weight-only and dynamic int8; `peer.py`), and int8 variables cast by hand (naive).
What is not to be had has a line with the reason instead of a figure.

    python benchmarks/saved_models.py --parts size,errors
    python benchmarks/saved_models.py --large 1    # ten matrices of 8192^2 too: 2.7 GB
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import figures
import numpy as np
import peer
import saved_model_zoo as zoo

LOADERS = ("v2", "v1")  # tf.saved_model.load, tf.compat.v1.saved_model.load
NAIVE = "naive cast"
OURS = tuple(version for version in zoo.VERSIONS if version != zoo.EQUAL)
LARGE = "d: 10 x 8192^2"
SPIKE = figures.SHARED / "spikes" / "savedmodel" / "r2.py"
FIRST = "first experiment"
MOST_ERROR, OVER_PEER, OVER_FIRST = 0.03, 1.1, 1.01
MEMORY_BARS = {"e: 4 x 4096^2": 0.52, LARGE: 0.35}
# Times over (below 1: as parts of) float's, by batch.
SPEED_BARS: Mapping[str, Mapping[int, float]] = {
    "portable weight-only-int8": {1: 2.5, 64: 1.3},
    "portable bf16-int8": {1: 2.5, 64: 1.3},
    "native bf16-int8": {1: 1 / 3.5, 64: 1 / 1.3},
    "native 90 % blocks, float32": {1: 1 / 10, 64: 1 / 5},
    "native 90 % blocks, int8": {1: 1 / 10, 64: 1 / 5},
}
SHAPES = {"e: 4 x 4096^2": (4, 4096), LARGE: (10, 8192)}


def main() -> int:
    args = figures.arguments(
        __doc__, parts="size,errors,memory,speed", large=0, rounds=40, seconds=240, folder="", threads="1,2", width=4096,
        models="", child="",
    )  # fmt: skip
    if args.child:
        asked = json.loads(args.child)
        print(json.dumps(CHILDREN[asked.pop("what")](**asked)), flush=True)
        return 0
    figure = figures.Figures(
        "saved_models",
        "Float SavedModels, paring's for stock TensorFlow (portable) and for its own operators (native), TensorFlow's "
        "quantize_saved_model, and int8 variables cast by hand. Errors: norm of the difference over the norm, the worst "
        "output of each signature under both loaders. Memory: resident set above that of TensorFlow after an import and one "
        f"operator, in fresh processes. Speed: 4 x MatMul {args.width}^2, all in one process in turns, processor time with one "
        "thread and wall time with two; median and middle half of the ratios in a round.",
    )
    warnings.simplefilter("ignore")
    parts = args.parts.split(",")
    with tempfile.TemporaryDirectory(prefix="saved-", dir=args.folder or None) as here:
        bench = Bench(figure, Path(here), args.seconds)
        if "size" in parts:
            size(bench)
        if "errors" in parts:
            wanted = [name for name in zoo.MODELS if any(part in name for part in args.models.split(","))]
            for name in [*wanted, *([LARGE] if args.large else [])]:
                errors(bench, name)
        for name in [*SHAPES][: 1 + args.large] if "memory" in parts else ():
            memory(bench, name)
        if "speed" in parts:
            speed(bench, args.width, [int(n) for n in args.threads.split(",")], args.rounds)
        for (model, version), why in bench.gaps.items():
            figure.note(f"{model}, {version}: {why}")
    return figure.finish(args.write)


class Bench:
    """Folders of models and their versions, each made once."""

    def __init__(self, figure: figures.Figures, here: Path, seconds: int) -> None:
        self.figure, self.here, self.seconds = figure, here, seconds
        self.gaps: dict[tuple[str, str], str] = {}
        self.made: dict[tuple[str, str], Path] = {}
        self.live: dict[str, Any] = {}

    def float_of(self, name: str) -> Path:
        """The float model of a name."""
        if (name, "float") not in self.made:
            build = zoo.MODELS.get(name) or zoo.NETWORKS.get(name) or zoo.chain(*SHAPES[name])
            target = self._folder(name, "float")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.live[name] = build(target)
            self.made[name, "float"] = target
        return self.made[name, "float"]

    def version(self, name: str, version: str) -> Path | None:
        """A version of a model; None, and a gap with the reason, where it cannot be had."""
        if version == "float":
            return self.float_of(name)
        key = (name, version)
        if key not in self.made and key not in self.gaps:
            source, target = self.float_of(name), self._folder(name, version)
            modes = {told: mode for mode, told in peer.PEERS.items()}
            if version in modes:
                why = peer.quantize(modes[version], source, target, self.seconds)
            elif version == NAIVE:
                why = self._by_hand(name, target)
            elif version == FIRST:
                why = first_experiment(source, target)
            else:
                why = zoo.write(version, source, target)
            if why is None:
                self.made[key] = target
            else:
                self.gaps[key] = why
        return self.made.get(key)

    def drop(self, name: str) -> None:
        """Removes the versions of a model; the float one stays."""
        for key in [key for key in self.made if key[0] == name and key[1] != "float"]:
            shutil.rmtree(self.made.pop(key))

    def _folder(self, name: str, version: str) -> Path:
        plain = "".join(c if c.isalnum() else "-" for c in name)
        return self.here / plain / "".join(c if c.isalnum() else "-" for c in version)

    def _by_hand(self, name: str, target: Path) -> str | None:
        if name in SHAPES:
            zoo.naive_chain(*SHAPES[name], target)
        elif name in zoo.NETWORKS:
            zoo.naive_keras(self.live[name], target)
        else:
            return "nothing to cast by hand: its functions hold the float variables"
        return None


def first_experiment(source: Path, target: Path) -> str | None:
    """What the experiment wrote that settled the design."""
    if not SPIKE.is_file():
        return f"no {SPIKE.name} in the shared folder"
    try:
        zoo.module("first_experiment", SPIKE).run(str(source), str(target))
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {peer.plain(str(error))}"
    return None


# -- size ----------------------------------------------------------------------------------------------------------


def size(bench: Bench) -> None:
    """Bytes of `variables/` over those of the quantized variables, stored once as float32, and growth of the graph."""
    for name in zoo.NETWORKS:
        source = bench.float_of(name)
        portable = bench.version(name, OURS[0])
        once = 4 * zoo.int8_elements(portable, source) if portable is not None else 0
        for version in ("float", *OURS[:4], NAIVE, *peer.PEERS.values()):
            folder = bench.version(name, version)
            if folder is None:
                continue
            graph = (folder / "saved_model.pb").stat().st_size
            share = zoo.variables_bytes(folder) / once
            growth = graph / (source / "saved_model.pb").stat().st_size
            whole = (graph + zoo.variables_bytes(folder)) / ((source / "saved_model.pb").stat().st_size + once)
            bench.figure.row(
                "size", network=name, version=version, variables=zoo.variables_bytes(folder), graph=graph,
                variables_over_float_once=share, graph_over_float=growth, both_over_float_once=whole,
            )  # fmt: skip
            if version in OURS:
                limit = 0.15 if "int4" in version else 0.26
                bench.figure.at_most(f"size, {name}, {version}: variables over float, stored once", share, limit)
                bench.figure.at_most(f"size, {name}, {version}: saved_model.pb over float's", growth, 1.2)
        bench.drop(name)


# -- errors --------------------------------------------------------------------------------------------------------


def errors(bench: Bench, name: str) -> None:
    """The relative error of each signature, under both loaders."""
    versions = [*OURS[:4], zoo.EQUAL, FIRST, *peer.PEERS.values()]
    folders = {
        version: found for version in ("float", *versions) if (found := bench.version(name, version)) is not None
    }
    arrays = dict(run_all(bench, name, folders))
    weights = {v: zoo.int8_elements(folder, folders["float"]) for v, folder in folders.items() if v != "float"}
    worst: dict[str, dict[str, float]] = {}
    for loader in LOADERS:
        truth = arrays.get(("float", loader))
        if truth is None:
            continue
        for version in folders.keys() - {"float"}:
            got = arrays.get((version, loader))
            for key in sorted({key.split("/")[0] for key in truth}) if got is not None else ():
                error = max(_gap(truth[k], got[k]) for k in truth if k.split("/")[0] == key)
                own = worst.setdefault(key, {})
                own[version] = max(own.get(version, 0.0), error)
    for key, found in worst.items():
        cells = {version: found.get(version, "-") for version in versions if version in folders}
        bench.figure.row("errors", model=name, signature=key, **cells)
    bench.figure.row(
        "int8 weights and loaders", model=name,
        **{version: f"{weights.get(version, 0):,}; {_loaders(arrays, version)}" for version in versions if version in folders},
    )  # fmt: skip
    for version in [version for version in OURS[:3] if version in folders]:
        ran = sum((version, loader) in arrays for loader in LOADERS)
        known = sum(("float", loader) in arrays for loader in LOADERS)
        bench.figure.at_least(f"errors, {name}, {version}: loaders it runs under, of {known}", ran, known)
        for key, found in worst.items():
            if version in found:
                bench.figure.at_most(f"errors, {name}, {key}, {version}", found[version], MOST_ERROR)
    for key, found in worst.items():  # where the same weights are int8
        for version in (OURS[1], zoo.EQUAL):
            for other, limit in ((FIRST, OVER_FIRST), *((p, OVER_PEER) for p in peer.PEERS.values())):
                if version in found and found.get(other) and weights[other] == weights[version]:
                    what = f"errors, {name}, {key}, {version}: over {other}"
                    bench.figure.at_most(what, found[version] / found[other], limit)
    if name not in SHAPES:
        bench.drop(name)


def _loaders(arrays: Mapping[tuple[str, str], Any], version: str) -> str:
    return " and ".join(loader for loader in LOADERS if (version, loader) in arrays) or "no loader"


def _gap(truth: np.ndarray, got: np.ndarray) -> float:
    if truth.dtype.kind not in "fV":
        return float(truth.shape != got.shape or not np.array_equal(truth, got))
    a, b = truth.astype(np.float64), got.astype(np.float64)
    size = float(np.linalg.norm(a))
    return float(np.linalg.norm(a - b)) / size if size else float(np.linalg.norm(b))


def run_all(
    bench: Bench, name: str, folders: Mapping[str, Path]
) -> Iterator[tuple[tuple[str, str], dict[str, np.ndarray]]]:
    """(version, loader) and all outputs; what does not run is a gap. Children, because TensorFlow aborts on some."""
    groups: list[list[str]] = [[v for v in folders if v not in peer.PEERS.values()]]
    groups += [[v] for v in folders if v in peer.PEERS.values()]
    for group in groups:
        tasks = [(version, loader) for version in group for loader in LOADERS]
        while tasks:
            asked = [[str(folders[v]), loader, str(folders[v].with_suffix(f".{loader}.npz"))] for v, loader in tasks]
            _, why = child(bench.seconds + 30 * len(tasks), what="outputs", tasks=asked)
            left = []
            for (version, loader), (_, _, file) in zip(tasks, asked, strict=True):
                said = Path(file).with_suffix(".txt")
                if Path(file).is_file():
                    with np.load(file, allow_pickle=True) as found:
                        yield (version, loader), dict(found)
                    Path(file).unlink()
                elif said.is_file():
                    bench.gaps[name, f"{version} under {loader}"] = said.read_text(encoding="utf-8")
                else:
                    left.append((version, loader))
            if left:  # the first of them ended the process
                bench.gaps[name, f"{left[0][0]} under {left[0][1]}"] = why or "ended without a word"
            tasks = left[1:]


# -- memory --------------------------------------------------------------------------------------------------------


def memory(bench: Bench, name: str) -> None:
    """Resident memory above TensorFlow's own, loaded and after calls."""
    found: dict[str, float] = {}
    for version in ("float", *OURS[:4], NAIVE, *peer.PEERS.values()):
        folder = bench.version(name, version)
        if folder is None:
            continue
        rows = [child(bench.seconds, what="resident", folder=str(folder), width=SHAPES[name][1]) for _ in range(3)]
        figures_ = [row for row, _ in rows if row is not None]
        if not figures_:
            bench.gaps[name, f"{version}, memory"] = rows[0][1]
            continue
        middle = sorted(figures_, key=lambda row: row["after_mb"])[len(figures_) // 2]
        found[version] = middle["after_mb"]
        bench.figure.row("memory", model=name, version=version, **middle, over_float=found[version] / found["float"])
    for version in (version for version in OURS[:2] if version in found):
        what = f"memory, {name}, {version}: over float"
        bench.figure.at_most(what, found[version] / found["float"], MEMORY_BARS[name])


# -- speed ---------------------------------------------------------------------------------------------------------


def speed(bench: Bench, width: int, threads: Sequence[int], rounds: int) -> None:
    """Time over float's, all versions in turns in one process for each number of threads."""
    name = f"e: 4 x {width}^2"
    SHAPES.setdefault(name, (4, width))
    versions = ("float", *OURS, NAIVE, *peer.PEERS.values())
    folders = {version: str(found) for version in versions if (found := bench.version(name, version)) is not None}
    for count in threads:
        asked = {"what": "timed", "folders": folders, "width": width, "threads": count, "rounds": rounds}
        found, why = child(bench.seconds + 60 * rounds, pool=count, **asked)
        if found is None:
            bench.gaps[name, f"speed with {count} threads"] = why
            continue
        for batch, rows in found.items():
            for version, row in rows.items():
                bench.figure.row("speed", threads=count, batch=int(batch), version=version, **row)
                limit = SPEED_BARS.get(version, {}).get(int(batch))
                if limit is not None:
                    what = f"speed, {version}, batch {batch}, {count} threads: time over float"
                    bench.figure.at_most(what, row["over_float"], limit)


# -- children ------------------------------------------------------------------------------------------------------


def child(seconds: float, pool: int = 0, **asked: Any) -> tuple[dict[str, Any] | None, str]:
    """What a function of `CHILDREN` gives in a process of its own, or why it gives nothing."""
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    counts = {f"TF_NUM_{kind}_THREADS": str(pool) for kind in ("INTRAOP", "INTEROP")} if pool else {}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, check=False, env={**os.environ, **counts}
        )
    except subprocess.TimeoutExpired:
        return None, f"not finished in {seconds:.0f} s"
    if done.returncode:
        return None, peer.why(done.returncode, done.stderr)
    return json.loads(done.stdout.splitlines()[-1]), ""


def load_operators(folders: Sequence[str]) -> None:
    """paring's operators, where a model has some."""
    if any(b"ImportParingTensorflow>" in Path(folder, "saved_model.pb").read_bytes() for folder in folders):
        import paring.tensorflow  # noqa: F401


def outputs(tasks: list[list[str]]) -> dict[str, Any]:
    """Writes all outputs of (folder, loader, file), or the reason beside it."""
    import tensorflow as tf

    runs = {"v2": zoo.models.run_v2, "v1": zoo.models.run_v1}
    for folder, loader, file in tasks:
        try:
            load_operators([folder])
            np.savez(file, **runs[loader](tf, Path(folder)))
        except Exception as error:
            Path(file).with_suffix(".txt").write_text(peer.plain(str(error)), encoding="utf-8")
    return {}


def resident(folder: str, width: int) -> dict[str, Any]:
    """Megabytes above TensorFlow's own."""
    import tensorflow as tf

    tf.matmul(tf.ones([8, 8]), tf.ones([8, 8])).numpy()
    x = tf.constant(np.random.default_rng(0).normal(size=(1, width)).astype(np.float32))
    before = _status("VmRSS")
    load_operators([folder])
    model = tf.saved_model.load(folder)
    loaded = _status("VmRSS") - before
    for _ in range(3):
        model.signatures["serving_default"](x=x)["y"].numpy()
    return {"loaded_mb": loaded, "after_mb": _status("VmRSS") - before, "peak_mb": _status("VmHWM") - before}


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    return float("nan")


def timed(folders: dict[str, str], width: int, threads: int, rounds: int) -> dict[str, Any]:
    """By batch and version: median and middle half of the times over float's, and milliseconds."""
    import tensorflow as tf

    from paring.measure.latency import interleaved

    load_operators([*folders.values()])
    clock = time.process_time if threads == 1 else time.perf_counter
    loaded = {version: tf.saved_model.load(folder) for version, folder in folders.items()}
    calls = {version: model.signatures["serving_default"] for version, model in loaded.items()}
    found: dict[str, Any] = {}
    for batch in (1, 64):
        x = tf.constant(np.random.default_rng(0).normal(size=(batch, width)).astype(np.float32))

        def run(version: str, x: Any = x) -> float:
            begun = clock()
            calls[version](x=x)["y"].numpy()
            return clock() - begun

        for version in calls:
            run(version), run(version)
        measures = [lambda version=version: run(version) for version in calls]
        times = np.array(list(islice(interleaved(measures), rounds)))
        low, middle, high = np.percentile(times / times[:, :1], (25, 50, 75), axis=0)
        found[str(batch)] = {
            version: {
                "ms": 1e3 * float(np.median(times[:, at])), "over_float": float(middle[at]), "low": float(low[at]),
                "high": float(high[at]), "times_faster": 1 / float(middle[at]),
            }
            for at, version in enumerate(calls)
        }  # fmt: skip
    return found


CHILDREN = {"outputs": outputs, "resident": resident, "timed": timed}

if __name__ == "__main__":
    sys.exit(main())
