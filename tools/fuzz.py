"""Feeds `paring.optimize` with broken files and holds it to its word: one clear error, or an output that runs.

    python tools/fuzz.py --count 2000 --seed 1 [--jobs 1] [--write docs/fuzz.md]
    python tools/fuzz.py --seed 1 --only 417 [--keep broken.tflite]      one mutation again, with its error

Mutation number N of seed S is always the same bytes and the same recipe. Each runs in a forked copy of this warm
process, so that a crash, a hang or a leak of one cannot touch the next, and its memory is its own. The bar:
it ends within 30 s, at no more than twice the memory (peak of parent plus peak of children) of the intact file's run;
either in a ParingError with one printable line, with no output and no temporary file left, or in success with an output
that runs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")  # a fork copies no threads

import numpy as np  # noqa: E402

from paring.data import feeds  # noqa: E402
from paring.demo import model_path  # noqa: E402
from paring.errors import ParingError  # noqa: E402
from paring.formats.tflite.constants import shape_of, type_name  # noqa: E402
from paring.formats.tflite.flatbuffer import _Reader  # noqa: E402
from paring.formats.tflite.model import TfliteModel  # noqa: E402
from paring.formats.tflite.schema import SCALARS, Field  # noqa: E402
from paring.formats.tflite.view import entries  # noqa: E402
from paring.optimize import optimize  # noqa: E402
from paring.runtime import Limits, Worker  # noqa: E402
from paring.verify import PATHS  # noqa: E402

SECONDS = 30.0
MEMORY = 2.0
RECIPES = ("dynamic-int8", "int8")
SHARED = Path(os.environ.get("PARING_SHARED", Path(__file__).resolve().parents[2] / "shared"))


# -- where things are ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A number in the file: where it is, how many bytes it takes, and what it says (the path the reader took)."""

    at: int
    size: int
    where: str


class _Surveyor(_Reader):
    """The reader, noting the place of everything that it follows."""

    def __init__(self, data: memoryview) -> None:
        super().__init__(data)
        self.cells: dict[str, list[Cell]] = {}

    def note(self, kind: str, at: int, size: int, where: str) -> None:
        self.cells.setdefault(kind, []).append(Cell(at, size, where))

    def follow(self, at: int, where: str) -> int:
        self.note("offset", at, 4, where)
        return super().follow(at, where)

    def length(self, at: int, size: int, where: str) -> int:
        self.note("length", at, 4, where)
        return super().length(at, size, where)

    def table(self, at: int, name: str, where: str) -> Any:
        vtable = at - int(np.frombuffer(self.data, "<i4", 1, at)[0])
        self.note("vtable", at, 4, f"{where} (field list)")
        for position in range(int(np.frombuffer(self.data, "<u2", 1, vtable)[0]) // 2):
            self.note("vtable", vtable + 2 * position, 2, f"{where} (field {position - 2})")
        return super().table(at, name, where)

    def value(self, at: int, field: Field, earlier: dict[str, Any], where: str) -> Any:
        found = super().value(at, field, earlier, where)
        if field.form == "scalar":
            self.note(_kind_of(where), at, field.inline_size, where)
        elif field.form == "vector of scalar" and not where.endswith((".data", ".custom_options")):
            size = SCALARS[field.of][1]
            start = at + int(np.frombuffer(self.data, "<u4", 1, at)[0]) + 4
            for i in range(min(found.size, 64)):
                self.note(_kind_of(where), start + i * size, size, f"{where}[{i}]")
        elif field.form == "vector of scalar" and where.endswith(".data") and 0 < found.nbytes <= 64:
            start = at + int(np.frombuffer(self.data, "<u4", 1, at)[0]) + 4
            for i in range(found.nbytes // 4):
                self.note("constant", start + i * 4, 4, f"{where}[{4 * i}]")
        return found


_KINDS = (
    ("shape", (".shape", ".shape_signature", ".has_rank")),
    ("index", (".inputs", ".outputs", ".intermediates", ".buffer", "_index", ".mutating_variable_inputs")),
    ("sparsity", (".sparsity",)),
    ("quantization", (".quantization",)),
    ("option", ("_options.", "_options2.")),
    ("type", ("type", "_code", ".version", ".is_variable")),
)


def _kind_of(where: str) -> str:
    for kind, parts in _KINDS:
        if any(part in where for part in parts[:1]) and kind in ("sparsity", "quantization", "option"):
            return kind
    for kind, parts in _KINDS:
        if where.split("[")[0].endswith(parts) or where.endswith(parts):
            return kind
    return "other"


def survey(data: bytes) -> dict[str, list[Cell]]:
    """Cells of a right file, by kind."""
    reader = _Surveyor(memoryview(data))
    reader.table(reader.follow(0, "Model"), "Model", "Model")
    return reader.cells


# -- mutations -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seed:
    """An intact file: its bytes, where its numbers are, samples for it."""

    name: str
    data: bytes
    cells: dict[str, list[Cell]] = field(repr=False)
    samples: dict[str, np.ndarray] = field(repr=False)

    @classmethod
    def of(cls, path: Path) -> Seed:
        data = path.read_bytes()
        model = TfliteModel.parse(memoryview(data), str(path))
        random = np.random.default_rng(7)
        subgraph, inputs, _ = next(iter(entries(model).values()))
        samples = {}
        for name, index in inputs.items():
            tensor = model.subgraphs[subgraph].tensors[index]
            shape = [3, *(max(1, d) for d in shape_of(tensor))]
            kind = np.dtype(type_name(tensor))
            values = random.normal(size=shape) if kind.kind == "f" else random.integers(0, 2, shape)
            samples[name] = values.astype(kind)
        return cls(path.name, data, survey(data), samples)


def _numbers(random: np.random.Generator, size: int, old: int, limit: int) -> int:
    """A number that is likely to hurt, in `size` bytes."""
    top = 1 << (8 * size)
    near = [old - 1, old + 1, old * 2, old // 2, old ^ (1 << int(random.integers(8 * size))), -old]
    far = [0, 1, 2, 3, 7, 16, 127, 128, 255, 256, 1000, 4096, 65535, 65536, 1 << 20, 1 << 24, 1 << 30]
    edge = [-1, -2, top - 1, top // 2, top // 2 - 1, limit, limit - 1, limit + 1, limit // 2]
    groups = (near, far, edge, [int(random.integers(0, min(top, 1 << 62)))])
    group = groups[int(random.choice(4, p=[0.4, 0.25, 0.2, 0.15]))]
    return int(group[int(random.integers(len(group)))]) % top


def _set_cell(random: np.random.Generator, data: bytearray, cell: Cell) -> str:
    old = int.from_bytes(data[cell.at : cell.at + cell.size], "little")
    new = _numbers(random, cell.size, old, len(data))
    data[cell.at : cell.at + cell.size] = new.to_bytes(cell.size, "little")
    return f"{cell.where} at byte {cell.at}: {old} -> {new}"


def _cells(kind: str) -> Callable[[np.random.Generator, bytearray, Seed, Sequence[Seed]], str]:
    def mutate(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
        cells = seed.cells.get(kind) or seed.cells["offset"]
        return _set_cell(random, data, cells[int(random.integers(len(cells)))])

    return mutate


def _swap_offset(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
    """An offset that leads to another table, vector or string of the same file."""
    cells = seed.cells["offset"]
    a, b = (cells[int(i)] for i in random.integers(len(cells), size=2))
    target = b.at + int.from_bytes(data[b.at : b.at + 4], "little")
    data[a.at : a.at + 4] = ((target - a.at) % (1 << 32)).to_bytes(4, "little")
    return f"{a.where} at byte {a.at} leads to what {b.where} leads to"


def _truncate(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
    places = [int(random.integers(len(data))), len(data) - int(random.integers(1, 65)), int(random.integers(64))]
    size = places[int(random.integers(3))]
    del data[size:]
    return f"cut to {size} bytes"


def _flip(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
    count = int(random.choice([1, 1, 2, 4, 16, 64]))
    for at in random.integers(len(data), size=count):
        data[at] ^= int(random.integers(1, 256))
    return f"{count} bytes flipped"


def _flip_tables(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
    """Blind flips, but where the tables are, not in the weights."""
    cells = [c for group in seed.cells.values() for c in group]
    count = int(random.choice([1, 2, 4, 8]))
    for cell in (cells[int(i)] for i in random.integers(len(cells), size=count)):
        data[min(len(data) - 1, cell.at + int(random.integers(-4, cell.size + 4)))] ^= 1 << int(random.integers(8))
    return f"{count} bits flipped among the tables"


def _splice(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
    source = others[int(random.integers(len(others)))]
    count = int(random.integers(1, 4096))
    start, at = int(random.integers(len(source.data))), int(random.integers(len(data)))
    piece = source.data[start : start + count]
    how = int(random.integers(3))
    data[at : at + (count if how == 0 else 0 if how == 1 else 4 * count)] = piece
    return f"{len(piece)} bytes of {source.name} at {at} ({('over', 'between', 'for four times as many')[how]})"


def _block(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
    count, at = int(random.integers(4, 512)), int(random.integers(len(data)))
    fill = (bytes(count), b"\xff" * count, random.bytes(count))[int(random.integers(3))]
    data[at : at + count] = fill[: len(data) - at]
    return f"{count} bytes at {at} overwritten"


def _tail(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
    """Something behind the flatbuffer: garbage, or the end of a ZIP whose directory lies."""
    if random.integers(2):
        data.extend(random.bytes(int(random.integers(1, 4096))))
        return "garbage appended"
    import io
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.txt", b"cat\n" * int(random.integers(1, 1 << 20)))
    raw = bytearray(out.getvalue())
    for at in random.integers(len(raw), size=int(random.integers(0, 9))):
        raw[at] ^= int(random.integers(1, 256))
    data.extend(raw)
    return "a ZIP, partly flipped, appended"


def _several(random: np.random.Generator, data: bytearray, seed: Seed, others: Sequence[Seed]) -> str:
    names = [n for n in MUTATIONS if n not in ("several", "splice", "truncate", "tail")]
    chosen = [names[int(i)] for i in random.integers(len(names), size=int(random.integers(2, 5)))]
    return "; ".join(MUTATIONS[name](random, data, seed, others) for name in chosen)


MUTATIONS: dict[str, Callable[[np.random.Generator, bytearray, Seed, Sequence[Seed]], str]] = {
    "truncate": _truncate,
    "flip bytes": _flip,
    "flip in tables": _flip_tables,
    "overwrite": _block,
    "splice": _splice,
    "tail": _tail,
    "offset": _cells("offset"),
    "crossed offset": _swap_offset,
    "field list": _cells("vtable"),
    "length": _cells("length"),
    "shape": _cells("shape"),
    "index": _cells("index"),
    "type or version": _cells("type"),
    "option": _cells("option"),
    "quantization": _cells("quantization"),
    "sparsity": _cells("sparsity"),
    "small constant": _cells("constant"),
    "several": _several,
}
SHARES = {"shape": 2.5, "index": 2, "option": 1.5, "several": 1.5, "small constant": 1.5, "offset": 1.5}


@dataclass(frozen=True)
class Case:
    """One mutated file."""

    number: int
    kind: str
    model: str
    recipe: str
    said: str
    data: bytes = field(repr=False, default=b"")


def mutation(seeds: Sequence[Seed], seed: int, number: int) -> Case:
    """Mutation `number` of `seed`: the same every time."""
    random = np.random.default_rng([seed, number])
    kinds = list(MUTATIONS)
    shares = np.array([SHARES.get(kind, 1.0) for kind in kinds])
    model = seeds[int(random.integers(len(seeds)))]
    kind = kinds[int(random.choice(len(kinds), p=shares / shares.sum()))]
    if kind == "sparsity" and kind not in model.cells:
        model = next((s for s in seeds if kind in s.cells), model)
    data, said = bytearray(model.data), ""
    while data == model.data:  # a number may be set to what it was
        said = MUTATIONS[kind](random, data, model, seeds)
    return Case(number, kind, model.name, RECIPES[number % len(RECIPES)], said, bytes(data))


# -- running -------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """How one run ended. `end` is reader, check, runtime, other (refused elsewhere), bound, success or broken."""

    end: str
    seconds: float
    memory: int
    message: str
    violations: list[str]


def run(data: bytes, recipe: str, samples: dict[str, np.ndarray] | None, baseline: int | None = None) -> Outcome:
    """Runs one file in a fork of this process."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        (folder / "temporary").mkdir()
        (folder / "out").mkdir()
        (folder / "in.tflite").write_bytes(data)
        started = time.perf_counter()
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(receive)
                os.setsid()
                _forked(folder, recipe, samples, send)
            finally:
                os._exit(70)
        os.close(send)
        said, status = _await(child, receive, 2 * SECONDS)
        seconds = time.perf_counter() - started
        if not said:
            how = "hangs" if seconds >= 2 * SECONDS else f"the process died (status {status})"
            return Outcome("broken", seconds, 0, how, [how])
        found = json.loads(said)
        outcome = Outcome(found["end"], found["seconds"], found["memory"], found["message"], found["violations"])
        outcome.violations += _left(folder, found["end"] == "success")
    if outcome.seconds > SECONDS:
        outcome.violations.append(f"took {outcome.seconds:.1f} s")
    if baseline is not None and outcome.memory > MEMORY * baseline:
        outcome.violations.append(f"took {outcome.memory / baseline:.2f} times the memory of the intact file")
    return outcome


def _await(child: int, pipe: int, seconds: float) -> tuple[bytes, int]:
    """What a fork says before it ends; a fork that does not end is killed with all that it started."""
    deadline, said = time.perf_counter() + seconds, b""
    while time.perf_counter() < deadline:
        if select.select([pipe], [], [], max(0.0, deadline - time.perf_counter()))[0]:
            chunk = os.read(pipe, 65536)
            if not chunk:
                break
            said += chunk
    os.close(pipe)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return said, os.waitpid(child, 0)[1]


def _forked(folder: Path, recipe: str, samples: dict[str, np.ndarray] | None, pipe: int) -> None:
    tempfile.tempdir = str(folder / "temporary")
    out = folder / "out" / "out.tflite"
    started = time.perf_counter()
    end, message, violations = "success", "", []
    warnings.simplefilter("error")  # a warning on the terminal is a second line
    try:
        optimize(folder / "in.tflite", recipe, samples if recipe == "int8" else None, output=out)
    except ParingError as error:
        end, message = _end_of(error), str(error)
        if error.exit_code not in (1, 2) or not message or "\n" in message:
            violations.append(f"exit code {error.exit_code}, message {message!r}")
        if not message.isprintable() or len(message) > 2000:
            violations.append(f"a message of {len(message)} characters, printable: {message.isprintable()}")
    except BaseException as error:
        end, message = "broken", f"{type(error).__name__}: {error}"
        place = traceback.extract_tb(error.__traceback__)[-1]
        violations.append(f"{message[:200]} ({Path(place.filename).name}:{place.lineno})")
    seconds = time.perf_counter() - started
    peak = [resource.getrusage(who).ru_maxrss << 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    if end == "success":
        said = _runs(out, samples)
        violations += [said] if said else []
    found = {"end": end, "seconds": seconds, "memory": sum(peak), "message": message, "violations": violations}
    os.write(pipe, json.dumps(found).encode())
    os._exit(0)


def _end_of(error: ParingError) -> str:
    if error.exit_code == 1:
        return "bound"
    cause: BaseException | None = error
    files = []
    while cause is not None:
        last = traceback.extract_tb(cause.__traceback__)[-1]
        files.append("client.py" if last.name == "_check_input" else Path(last.filename).name)
        cause = cause.__cause__
    if "flatbuffer.py" in files:
        return "reader"
    if "client.py" in files:
        return "runtime"
    return "check" if {"check.py", "shapes.py", "constants.py", "model.py"} & set(files) else "other"


def _runs(path: Path, samples: dict[str, np.ndarray] | None) -> str:
    """Empty where the written file loads and runs on a path that users have, made-up sample or given."""
    said = []
    for kernels, data in itertools.product(PATHS, (None, samples)):
        try:
            sample = feeds(TfliteModel.open(path), data)[0].head(1)[0]
            with Worker(Limits(60.0)) as worker:
                worker.load("out", path, kernels=kernels)
                worker.run("out", sample)
            return ""
        except ParingError as error:
            said.append(f"{kernels}: {error}")
    return f"the output does not run: {'; '.join(said)}"


def _left(folder: Path, success: bool) -> list[str]:
    left = [p.name for p in (folder / "temporary").iterdir()]
    left += [p.name for p in (folder / "out").iterdir() if not (success and p.name == "out.tflite")]
    return [f"left behind: {', '.join(sorted(left))}"] if left else []


# -- the whole -----------------------------------------------------------------------------------------------------


def models(paths: Sequence[str]) -> list[Seed]:
    """The intact files: those named, or the demo model and the shared ones."""
    found = [Path(p) for p in paths] or [model_path(), *sorted((SHARED / "models").glob("*.tflite"))]
    return [Seed.of(path) for path in found]


def baselines(seeds: Sequence[Seed]) -> dict[tuple[str, str], Outcome]:
    """The run of each intact file with each recipe."""
    return {(s.name, recipe): run(s.data, recipe, s.samples) for s in seeds for recipe in RECIPES}


def fuzz(
    seeds: Sequence[Seed], intact: dict[tuple[str, str], Outcome], seed: int, numbers: Sequence[int], jobs: int = 1
) -> Iterator[tuple[Case, Outcome]]:
    """Runs the mutations with these numbers, in order."""
    samples = {s.name: s.samples for s in seeds}

    def one(number: int) -> tuple[Case, Outcome]:
        case = mutation(seeds, seed, number)
        outcome = run(case.data, case.recipe, samples[case.model], intact[case.model, case.recipe].memory)
        return replace(case, data=b""), outcome

    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(one, numbers)


ENDS = {
    "reader": "reader", "check": "check", "runtime": "runtime", "other": "elsewhere", "bound": "bound (exit 1)",
    "success": "succeeded", "broken": "BROKEN",
}  # fmt: skip


def report(
    results: Sequence[tuple[Case, Outcome]], intact: dict[tuple[str, str], Outcome], seed: int, taken: float
) -> str:
    """The page: kind of mutation x outcome, the slowest, the largest, every violation."""
    table = Counter((case.kind, outcome.end) for case, outcome in results)
    kinds = [kind for kind in MUTATIONS if any((kind, end) in table for end in ENDS)]
    lines = [
        "# Hostile input",
        "",
        f"`python tools/fuzz.py --count {len(results)} --seed {seed}` on {platform.machine()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}: {len(results)} mutated files of {len(intact) // len(RECIPES)} models in "
        f"{taken / 60:.0f} minutes. Half of them go through `dynamic-int8` without data, half through `int8` with "
        "samples. Each has to end within 30 s and twice the memory of the intact file, in one line of error with "
        "nothing left behind, or in an output that runs.",
        "",
        f"| mutation | {' | '.join(ENDS.values())} | all |",
        f"|---|{'---:|' * (len(ENDS) + 1)}",
    ]
    for kind in kinds:
        counts = [table[kind, end] for end in ENDS]
        lines.append(f"| {kind} | {' | '.join(str(c or '') for c in counts)} | {sum(counts)} |")
    totals = [sum(table[kind, end] for kind in kinds) for end in ENDS]
    lines += [f"| **all** | {' | '.join(str(t) for t in totals)} | {sum(totals)} |", ""]
    slowest = max(results, key=lambda r: r[1].seconds)
    ratio = [(o.memory / intact[c.model, c.recipe].memory, c) for c, o in results]
    largest = max(ratio, key=lambda r: r[0])
    lines += [
        "Refused by the reader: an offset, length or table that cannot be. By the checks: what it says cannot mean a "
        "model. By the runtime: LiteRT, in its child process, would not run the input. Elsewhere: samples that do not "
        "fit, weights that are not finite. Exit code 2 in all four.",
        "",
        f"- Slowest: {slowest[1].seconds:.1f} s ({slowest[0].kind} of {slowest[0].model}, number {slowest[0].number})",
        f"- Most memory: {largest[0]:.2f} times the intact file ({largest[1].kind} of {largest[1].model}, "
        f"number {largest[1].number})",
        f"- Violations: {sum(bool(o.violations) for _, o in results)}",
    ]
    for case, outcome in results:
        for violation in outcome.violations:
            said = " ".join(violation.split())
            where = f"number {case.number}, {case.model}, {case.recipe}, {case.kind} ({case.said[:200]})"
            lines.append(f"  - {where}: {said}")
    lines += ["", "| intact file | recipe | s | MB, parent and children |", "|---|---|---:|---:|"]
    for (name, recipe), outcome in intact.items():
        lines.append(f"| {name} | {recipe} | {outcome.seconds:.1f} | {outcome.memory / 2**20:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="how many mutated files")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--only", type=int, nargs="+", help="only these numbers, with what they say")
    parser.add_argument("--keep", help="with --only: write the mutated file here")
    parser.add_argument("--write", help="write the page here")
    parser.add_argument("models", nargs="*", help="intact .tflite files; the demo and the shared models by default")
    asked = parser.parse_args()
    seeds = models(asked.models)
    if asked.keep:
        Path(asked.keep).write_bytes(mutation(seeds, asked.seed, asked.only[0]).data)
    started = time.perf_counter()
    intact = baselines(seeds)
    for (name, recipe), outcome in intact.items():
        if outcome.end != "success" or outcome.violations:
            raise SystemExit(f"{name} with {recipe} is no intact file: {outcome}")
    numbers = asked.only or range(asked.first, asked.first + asked.count)
    results = []
    for case, outcome in fuzz(seeds, intact, asked.seed, numbers, asked.jobs):
        results.append((case, outcome))
        if asked.only or outcome.violations:
            print(f"{case!s:.500} | {outcome}", file=sys.stderr, flush=True)
    page = report(results, intact, asked.seed, time.perf_counter() - started)
    print(page)
    if asked.write:
        Path(asked.write).write_text(page, encoding="utf-8")
    return int(any(o.violations for _, o in results))


if __name__ == "__main__":
    sys.exit(main())
