"""The parent's side of the child process: starts it, bounds it, turns its failures into errors."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, cast

import numpy as np

from paring.calibration import TensorStatistics
from paring.errors import InputError, ParingError, UnsupportedError
from paring.measure.latency import Latency
from paring.runtime.program import Program
from paring.runtime.wire import receive, send


class RunError(ParingError):
    """A model could not be run: refused by the runtime, out of time or memory, or it crashed the child."""


class OutOfTime(RunError):
    """The child was ended because a request took longer than its limit."""


_KINDS = {kind.__name__: kind for kind in (InputError, UnsupportedError)}  # what the child found wrong itself
_BASE = 64 * 2**20  # what the smallest model takes, several times over
# The child needs a few modules and not all that the package brings, which takes as long to import as NumPy.
_CHILD = """
import sys, types
for name, folder in {folders!r}.items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from paring.runtime.worker import main
main()
"""
_FOLDERS = {"paring": str(Path(__file__).parents[1]), "paring.runtime": str(Path(__file__).parent)}
_AHEAD = 8  # samples that wait in the pipe, so that parent and child do not wait for each other's turn
_DOZEN, _LOAD = 32, 2**20  # samples and bytes in one request of `run_many`
_TICK = 0.1  # seconds between two looks at the clock
_SMALL = 5e7  # multiply-adds: below, XNNPACK's threads wait for each other longer than they work
_START = 300.0  # seconds for the child to begin: a slow disk or a busy machine is no fault of the model


@dataclass(frozen=True)
class Limits:
    """Bounds of the child.

    Attributes:
      seconds: Wall time of one request (one load, one sample).
      memory: Bytes of private memory beyond what the runtime itself takes; 0 for no limit.
      threads: How many a model of this size gains from; 0 for one on each core.
    """

    seconds: float = 60.0
    memory: int = 0
    threads: int = 0

    @classmethod
    def for_model(cls, file_bytes: int, activation_bytes: int, multiplications: float = 0.0) -> Limits:
        """Room for a right model of this size, and little more.

        Args:
          file_bytes: Weights: mapped, unpacked and packed again for the kernels.
          activation_bytes: All activations together, without reuse of memory.
          multiplications: Multiply-adds of one sample; the slowest kernels do 1e9 a second.
        """
        memory = _BASE + 3 * file_bytes + 4 * activation_bytes
        seconds = 10.0 + (file_bytes + activation_bytes) / 20e6 + multiplications / 1e9
        return cls(seconds, memory, threads=1 if multiplications < _SMALL else 0)


@dataclass(frozen=True)
class Sensed:
    """What one sample showed inside a SavedModel.

    Attributes:
      outputs: Of the signature.
      results: By point, the results of all its executions (or what they read as their first input).
      alone: Of the optimized model, the results of the layer fed with what it read in the float model.
      sizes: For every point, the bytes that it read and made.
    """

    outputs: list[np.ndarray]
    results: dict[int, list[np.ndarray]]
    alone: dict[int, list[np.ndarray]]
    sizes: list[int]


class Worker:
    """A child process that runs models; use it as a context manager."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        threads: int | None = None,
        program: str = _CHILD.format(folders=_FOLDERS),
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the child; it loads the runtime while the parent goes on.

        Args:
          limits: Bounds on time and memory.
          threads: How many; those of the limits where None.
          program: What the child runs, if it is not to run LiteRT.
          variables: More environment variables for it.
        """
        self.limits = limits or Limits()
        self.threads = threads or self.limits.threads or os.cpu_count() or 1
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the child)
        # BLAS gets one thread: the kernels' own threads are at work when statistics are taken.
        paths = os.pathsep.join(p for p in sys.path if p)
        environment = {**os.environ, "PYTHONPATH": paths, "OPENBLAS_NUM_THREADS": "1", **(variables or {})}
        self._child = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
        )
        self._open = 0  # requests without an answer so far
        self._ready = False
        self._deadline, self._late = float("inf"), False
        threading.Thread(target=self._watch, daemon=True).start()
        self._start("limit", extra=self.limits.memory, threads=self.threads)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the child."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout, self._log):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    # -- requests ------------------------------------------------------------------------------------------------

    def load(
        self, name: str, path: str | Path, *, kernels: str = "xnnpack", threads: int | None = None, stream: bool = False
    ) -> None:
        """Loads a model file; `kernels` is xnnpack (what users run), builtin or reference.

        What operators remember is forgotten before each sample, unless the samples are one `stream`.
        """
        self._call("load", name=name, path=str(path), kernels=kernels, threads=threads or self.threads, stream=stream)

    def enter(self, name: str, source: str, signature: str, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Another entry of the loaded model `source`; `run` takes and gives arrays in the order of these names."""
        self._call("enter", name=name, source=source, signature=signature, inputs=list(inputs), outputs=list(outputs))

    def load_program(self, name: str, program: Program, *, kernels: str = "xnnpack") -> None:
        """Loads a program; `run`, `watch` (its `watched` tensors), `observe` and `gather` work on it as on a model."""
        values, data = list(program.constants.values()), program.to_data()
        self._call("load_program", values, name=name, program=data, kernels=kernels, threads=self.threads)

    def capture(
        self, name: str, inputs: Sequence[np.ndarray], routines: Sequence[int]
    ) -> dict[int, list[list[np.ndarray]]]:
        """Runs one sample through a program -> for each routine what it read in its first and its last call."""
        message, arrays = self._call("capture", list(inputs), name=name, routines=list(routines))
        found, rest = {}, iter(arrays)
        for number, calls, size in zip(routines, message["calls"], message["sizes"], strict=True):
            found[number] = [[next(rest) for _ in range(size)] for _ in range(calls)]
        return found

    def collect(self, name: str, inputs: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Runs one sample through a program -> for each tensor it watches every value it took, loops included."""
        message, arrays = self._call("collect", list(inputs), name=name)
        rest = iter(arrays)
        return [[next(rest) for _ in range(count)] for count in message["counts"]]

    def drop(self, name: str) -> None:
        """Forgets a model."""
        self._call("drop", name=name)

    def allow(self, seconds: float) -> None:
        """Gives every later request so much time."""
        self._settle()
        self.limits = replace(self.limits, seconds=seconds)

    def run(self, name: str, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs one sample, inputs in the model's order -> outputs in the model's order."""
        return self._call("run", list(inputs), name=name)[1]

    def run_many(self, name: str, samples: Iterable[Sequence[np.ndarray]]) -> Iterator[list[np.ndarray]]:
        """Runs samples one by one -> the outputs of each; they travel by the dozen, which saves small models' time."""
        batch: list[Sequence[np.ndarray]] = []
        for sample in samples:
            batch.append(sample)
            if len(batch) >= _DOZEN or len(batch) * sum(a.nbytes for a in sample) >= _LOAD:
                yield from self._run_batch(name, batch)
                batch = []
        if batch:
            yield from self._run_batch(name, batch)

    def _run_batch(self, name: str, batch: list[Sequence[np.ndarray]]) -> Iterator[list[np.ndarray]]:
        arrays = [array for sample in batch for array in sample]
        found = self._call("run_many", arrays, seconds=self.limits.seconds * len(batch), name=name)[1]
        size = len(found) // len(batch)
        return (found[place * size : (place + 1) * size] for place in range(len(batch)))

    def watch(self, name: str, wanted: Sequence[set[str]]) -> None:
        """Starts statistics over the model's outputs: for each what to keep (empty: nothing)."""
        self._call("watch", name=name, wanted=[sorted(w) for w in wanted])

    def observe(self, name: str, inputs: Sequence[np.ndarray]) -> None:
        """Runs one sample into the statistics; returns before it is done, errors come with a later request."""
        self._settle(_AHEAD)
        self._start("observe", list(inputs), name=name)

    def gather(self, name: str) -> dict[int, TensorStatistics]:
        """The statistics by output position."""
        message, arrays = self._call("gather", name=name)
        rest = iter(arrays)
        found = {}
        for position, low, high, count, parts in message["statistics"]:
            values = {part: np.array(next(rest)) for part in parts}
            found[int(position)] = TensorStatistics(float(low), float(high), int(count), **values)
        return found

    def beat(self, name: str, calls: int) -> tuple[float, float]:
        """Wall and CPU seconds of so many calls on the latest sample."""
        found, _ = self._call("beat", name=name, calls=calls)
        return float(found["wall"]), float(found["cpu"])

    def memory(self) -> tuple[int, int]:
        """Bytes of memory that the child has now, and had at most; 0 where the system does not say."""
        found, _ = self._call("memory")
        return int(found["now"]), int(found["peak"])

    def paths(self, name: str) -> dict[str, list[str]]:
        """The operators of a model that has run once, by what runs them: `xnnpack`, `builtin`, `unseen`, ..."""
        return dict(self._call("paths", name=name)[0]["paths"])

    def describe(self, name: str) -> Mapping[str, Any]:
        """`inputs` (name, shape, type) and `outputs` (names) of a TensorFlow or Keras model."""
        return self._call("describe", name=name)[0]

    def probe(
        self, name: str, path: str | Path, points: Sequence[tuple[str, str, tuple[int, ...]]], exact: str
    ) -> None:
        """Loads a SavedModel to look into at (function, operator, inputs); `exact`: the float model's probe, or nothing."""
        self._call("probe", name=name, path=str(path), points=[list(point) for point in points], exact=exact)

    def sense(
        self, name: str, signature: str, sample: Sequence[np.ndarray], wanted: Sequence[int], *, inputs: bool = False
    ) -> Sensed:
        """Runs one sample through a probe; `wanted` are numbers of points, whose `inputs` may be asked for instead."""
        message, arrays = self._call(
            "sense", list(sample), name=name, signature=signature, wanted=list(wanted), inputs=inputs
        )
        rest = iter(arrays)
        outputs = [next(rest) for _ in range(message["outputs"])]
        seen = [
            {number: [next(rest) for _ in range(count)] for number, count in zip(wanted, counts, strict=True)}
            for counts in message["counts"]
        ]
        return Sensed(outputs, seen[0], seen[1], message["sizes"])

    def seal(self, path: str | Path) -> None:
        """Writes the fingerprint of a SavedModel folder, as TensorFlow does when it saves."""
        self._call("seal", path=str(path))

    def time(self, names: Sequence[str], inputs: Sequence[np.ndarray], rounds: int = 30) -> dict[str, Latency]:
        """Latency of loaded models on one sample, interleaved; the ratio is to the first."""
        message, _ = self._call("time", list(inputs), seconds=600.0, names=list(names), rounds=rounds)
        return {name: Latency(**found) for name, found in message["latency"].items()}

    # -- the pipe ------------------------------------------------------------------------------------------------

    def _call(
        self, method: str, arrays: list[np.ndarray] | None = None, seconds: float | None = None, **arguments: Any
    ) -> tuple[Mapping[str, Any], list[np.ndarray]]:
        self._settle()
        self._start(method, arrays, **arguments)
        return self._settle(seconds=seconds)

    def _start(self, method: str, arrays: list[np.ndarray] | None = None, **arguments: Any) -> None:
        """Sends a request; where the pipe is full that takes until the child has done what it was sent before."""
        limit = (1 + self._open) * (self.limits.seconds if self._ready else _START)
        self._deadline = time.monotonic() + limit
        try:
            send(cast(BinaryIO, self._child.stdin), {"call": method, **arguments}, arrays)
            self._open += 1
        except (BrokenPipeError, OSError) as error:
            raise self._died(limit) from error
        finally:
            self._deadline = float("inf")

    def _settle(self, left: int = 0, seconds: float | None = None) -> tuple[Mapping[str, Any], list[np.ndarray]]:
        """Takes answers until no more than `left` requests are open -> the last answer."""
        message: Mapping[str, Any] = {}
        arrays: list[np.ndarray] = []
        while self._open > left:
            self._open -= 1
            limit = seconds or self.limits.seconds if self._ready else _START
            self._ready = True
            self._deadline = time.monotonic() + limit
            try:
                message, arrays = receive(cast(BinaryIO, self._child.stdout))
            except (EOFError, ValueError) as error:
                raise self._died(limit) from error
            finally:
                self._deadline = float("inf")
            if not message["ok"]:
                if message.get("kind") in _KINDS:
                    raise _KINDS[message["kind"]](message["error"])
                raise RunError(f"the runtime refuses the model: {_short(message['error'])}")
        return message, arrays

    def _watch(self) -> None:
        """Kills the child when an answer is late. One thread for all requests: to start one takes a millisecond."""
        while self._child.poll() is None:
            if time.monotonic() > self._deadline:
                self._late = True
                self._child.kill()
            time.sleep(_TICK)

    def _died(self, limit: float) -> RunError:
        self._child.wait()
        if self._late:
            return OutOfTime("the model does not finish", expected=f"an answer within {limit:.0f} s")
        code = self._child.returncode
        name = signal.Signals(-code).name if code and code < 0 else f"exit code {code}"
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - 2000))
        lines = [line for line in self._log.read().decode("utf-8", "replace").splitlines() if line.strip()]
        said = f", saying: {_short(lines[-1])}" if lines and not lines[-1].startswith("INFO") else ""
        return RunError(f"the runtime ended while it ran the model ({name}{said})")


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) < 300 else text[:297] + "..."


__all__ = ["Limits", "OutOfTime", "RunError", "Worker"]
