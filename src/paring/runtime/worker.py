"""The child process: holds interpreters, runs them on what the parent sends, keeps statistics where they arise."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from paring.calibration import TensorStatistics
from paring.errors import ParingError
from paring.measure.latency import latency
from paring.runtime.native import delegate_path
from paring.runtime.program import Program, ProgramSession
from paring.runtime.wire import receive, send

_TAKING = ("run", "run_many", "observe", "time", "load_program", "capture", "collect", "sense")
KERNELS = {
    "xnnpack": "BUILTIN",
    "sparse": "BUILTIN",
    "builtin": "BUILTIN_WITHOUT_DEFAULT_DELEGATES",
    "reference": "BUILTIN_REF",
}


def _interpreter(path: str, resolver: str, threads: int, sparse: bool) -> Any:
    from ai_edge_litert.interpreter import Interpreter, OpResolverType, load_delegate

    delegates = [load_delegate(delegate_path(), {"num_threads": threads})] if sparse else None
    return Interpreter(
        model_path=path, num_threads=threads, experimental_op_resolver_type=OpResolverType[resolver],
        experimental_delegates=delegates,
    )  # fmt: skip


def _taken(interpreter: Any) -> set[int]:
    """The operators that delegates run: their nodes say what those they took over read and made; all between are theirs."""
    nodes = interpreter._get_ops_details()
    makers = {int(t): node["index"] for node in nodes for t in node["outputs"] if node["op_name"] != "DELEGATE"}
    taken: set[int] = set()
    for node in nodes:
        if node["op_name"] == "DELEGATE":
            ends, open_ = {int(t) for t in node["inputs"]}, [int(t) for t in node["outputs"]]
            while open_:
                tensor = open_.pop()
                if tensor in makers and tensor not in ends:
                    ends.add(tensor)
                    taken.add(makers[tensor])
                    open_ += [int(t) for t in nodes[makers[tensor]]["inputs"]]
    return taken


class Session:
    """One loaded model."""

    def __init__(self, path: str, kernels: str, threads: int, *, stream: bool = False) -> None:
        """Builds the interpreter; memory for activations comes with the first run. A `stream` keeps its state."""
        sparse = kernels == "sparse"
        self.interpreter = _interpreter(path, KERNELS[kernels], threads, sparse)
        # The delegate alone: behind XNNPACK's own nodes it could not be told what ours takes.
        self.ours_alone = partial(_interpreter, path, KERNELS["builtin"], threads, sparse) if sparse else None
        self.inputs = [d["index"] for d in self.interpreter.get_input_details()]
        self.outputs = [d["index"] for d in self.interpreter.get_output_details()]
        self.allocated, self.stream = False, stream
        self.statistics: list[tuple[int, set[str], TensorStatistics]] = []

    @property
    def again(self) -> Callable[[], Any]:
        """Runs the latest sample again, state and all; nothing is copied in or out."""
        found: Callable[[], Any] = self.interpreter.invoke
        return found

    def paths(self) -> dict[str, list[str]]:
        """The operators by what runs them: `xnnpack`, `sparse`, `builtin`, or `unseen` where nobody reads what they make."""
        nodes, taken = self.interpreter._get_ops_details(), _taken(self.interpreter)
        claimed = set() if self.ours_alone is None else _taken(self.ours_alone())
        read = {int(t) for node in nodes for t in node["inputs"]}.union(self.outputs)
        found: dict[str, list[str]] = {"xnnpack": [], "sparse": [], "builtin": [], "unseen": []}
        for node in nodes:
            seen = any(int(t) in read for t in node["outputs"])
            if node["op_name"] != "DELEGATE":
                ours = "sparse" if node["index"] in claimed else "xnnpack"
                key = ours if node["index"] in taken | claimed else "builtin" if seen else "unseen"
                found[key].append(str(node["op_name"]))
        return found

    def invoke(self, arrays: list[np.ndarray], *, reset: bool = True) -> None:
        """Runs one sample; inputs in the model's order, resized where their shape asks for it."""
        details = self.interpreter.get_input_details()
        for detail, array in zip(details, arrays, strict=True):
            if tuple(detail["shape"]) != array.shape:
                self.interpreter.resize_tensor_input(detail["index"], array.shape)
                self.allocated = False
        if not self.allocated:
            self.interpreter.allocate_tensors()
            self.allocated = True
        elif reset and not self.stream:
            self.interpreter.reset_all_variables()
        for detail, array in zip(details, arrays, strict=True):
            if array.size:
                self.interpreter.set_tensor(detail["index"], array)
        self.interpreter.invoke()

    def run(self, arrays: list[np.ndarray], *, reset: bool = True) -> list[np.ndarray]:
        """Runs one sample and copies the outputs; state starts anew unless `reset` is False."""
        self.invoke(arrays, reset=reset)
        return [self.value(i) for i in self.outputs]

    def value(self, output: int, *, copy: bool = True) -> np.ndarray:
        """What an output holds. The binding refuses those without elements, as the first steps of a loop make them."""
        try:
            found = self.interpreter.get_tensor(output) if copy else self.interpreter.tensor(output)()
        except ValueError:
            detail = next(d for d in self.interpreter.get_output_details() if d["index"] == output)
            if 0 not in detail["shape"]:
                raise
            found = np.zeros(detail["shape"], detail["dtype"])
        return np.asarray(found)

    def observe(self, arrays: list[np.ndarray]) -> None:
        """Runs one sample and takes its outputs into the statistics, without copying them."""
        self.invoke(arrays)
        for position, wanted, statistics in self.statistics:
            statistics.update(self.value(self.outputs[position], copy=False), wanted)


class SignatureSession:
    """One entry of a loaded model that is not its first subgraph: it is reached by its signature's name."""

    def __init__(self, session: Session, signature: str, inputs: list[str], outputs: list[str]) -> None:
        """Names the inputs in the order that samples have, and the outputs in the order they are given back."""
        self.session = session  # the runner holds no reference of its own
        self.runner = session.interpreter.get_signature_runner(signature)
        self.inputs, self.outputs = inputs, outputs

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Runs one sample."""
        found = self.runner(**dict(zip(self.inputs, arrays, strict=True)))
        return [np.array(found[name]) for name in self.outputs]


def _peak() -> int:
    """Most bytes of memory so far, where there is no /proc; 0 where nobody says."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _limit_memory(extra: int, threads: int) -> None:
    try:
        import resource
    except ImportError:  # no such limit on this platform
        return
    # Private writable memory, not address space: allocators reserve far more of that than they use.
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    # Each thread reserves a stack, which counts in full though little of it is ever touched.
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stacks = threads * (stack if 0 < stack < 2**30 else 8 * 2**20)
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    wanted = now + extra + stacks
    resource.setrlimit(resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


class Server:
    """Answers one request after the other."""

    def __init__(self) -> None:
        self.sessions: dict[str, Any] = {}

    def limit(self, extra: int, threads: int = 1) -> dict[str, Any]:
        """Bounds private memory to what is in use now plus `extra` bytes."""
        import ai_edge_litert.interpreter  # noqa: F401  (before the limit: the library itself is not the model's)

        if extra and os.path.exists("/proc/self/statm"):
            _limit_memory(extra, threads)
        return {}

    def load(self, name: str, path: str, kernels: str, threads: int, stream: bool) -> dict[str, Any]:
        """Loads a model file under a name."""
        self.sessions[name] = Session(path, kernels, threads, stream=stream)
        return {}

    def enter(self, name: str, source: str, signature: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
        """Another entry of a loaded model, under a name of its own."""
        self.sessions[name] = SignatureSession(self.sessions[source], signature, inputs, outputs)
        return {}

    def load_program(
        self, name: str, program: dict[str, Any], kernels: str, threads: int, arrays: list[np.ndarray]
    ) -> dict[str, Any]:
        """Loads a program under a name; the arrays are its constants."""
        loaded = Program.from_data(program, arrays)
        self.sessions[name] = ProgramSession(loaded, lambda path: Session(path, kernels, threads))
        return {}

    def capture(
        self, name: str, routines: list[int], arrays: list[np.ndarray]
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Runs a sample through a program -> what each routine read in its first and its last call."""
        self.sessions[name].run(arrays)
        found = [self.sessions[name].captured(number) for number in routines]
        sizes = [len(calls[0]) if calls else 0 for calls in found]
        return {"calls": [len(calls) for calls in found], "sizes": sizes}, [
            a for calls in found for call in calls for a in call
        ]

    def collect(self, name: str, arrays: list[np.ndarray]) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Runs a sample through a program -> every value that each watched tensor took."""
        found = self.sessions[name].collect(arrays)
        return {"counts": [len(values) for values in found]}, [value for values in found for value in values]

    def drop(self, name: str) -> dict[str, Any]:
        """Forgets a model."""
        self.sessions.pop(name, None)
        return {}

    def run(self, name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Runs a sample."""
        return self.sessions[name].run(arrays)

    def run_many(self, name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """Runs samples one after the other -> the outputs of all in a row."""
        session = self.sessions[name]
        size = len(session.inputs)
        samples = [arrays[start : start + size] for start in range(0, len(arrays), size)]
        return [output for sample in samples for output in session.run(sample)]

    def watch(self, name: str, wanted: list[list[str]]) -> dict[str, Any]:
        """Starts statistics: for each output of the model what to keep."""
        requests = [set(w) for w in wanted]
        self.sessions[name].statistics = [(i, w, TensorStatistics.for_requests(w)) for i, w in enumerate(requests) if w]
        return {}

    def observe(self, name: str, arrays: list[np.ndarray]) -> dict[str, Any]:
        """Runs a sample into the statistics."""
        self.sessions[name].observe(arrays)
        return {}

    def gather(self, name: str) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The statistics so far."""
        head, arrays = [], []
        for position, _, s in self.sessions[name].statistics:
            parts = []
            for part in ("histogram", "mean_sum", "square_sum"):
                value = getattr(s, part)
                if value is not None:
                    parts.append(part)
                    arrays.append(value)
            head.append([position, s.low, s.high, s.count, parts])
        return {"statistics": head}, arrays

    def beat(self, name: str, calls: int) -> dict[str, Any]:
        """Wall and CPU seconds of so many calls on the latest sample, after one that fills the caches."""
        again = self.sessions[name].again
        if calls > 1:
            again()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            again()
        return {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}

    def memory(self) -> dict[str, Any]:
        """Bytes of memory that this process has now, and had at most, shared libraries and mapped files included."""
        try:
            with open("/proc/self/status", encoding="ascii") as file:
                found = {key: value.split() for key, _, value in (line.partition(":") for line in file)}
            return {"now": 1024 * int(found["VmRSS"][0]), "peak": 1024 * int(found["VmHWM"][0])}
        except OSError:
            return {"now": 0, "peak": _peak()}

    def paths(self, name: str) -> dict[str, Any]:
        """The operators of a model that ran, by runtime path."""
        return {"paths": self.sessions[name].paths()}

    def time(self, names: list[str], rounds: int, arrays: list[np.ndarray]) -> dict[str, Any]:
        """Latency of several loaded models on one sample, interleaved round by round."""
        for name in names:
            self.sessions[name].invoke(arrays)
        runs = {name: self.sessions[name].interpreter.invoke for name in names}
        found = latency(runs, rounds=rounds)
        return {"latency": {name: asdict(value) for name, value in found.items()}}


def main() -> None:
    """Serves LiteRT models until the parent closes the pipe."""
    serve(Server())


def serve(server: Server) -> None:
    """Answers requests until the parent closes the pipe."""
    pipe_in = sys.stdin.buffer
    # What libraries print must not end up between messages.
    pipe_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            message, arrays = receive(pipe_in)
        except EOFError:
            return
        method = message.pop("call")
        try:
            call = getattr(server, method)
            found = call(**message, arrays=arrays) if method in _TAKING else call(**message)
            head, out = found if isinstance(found, tuple) else ({}, found) if isinstance(found, list) else (found, [])
            send(pipe_out, {"ok": True, **head}, out)
        except MemoryError:
            send(pipe_out, {"ok": False, "error": "it needs more memory than its limit"})
        except ParingError as error:
            send(pipe_out, {"ok": False, "error": str(error), "kind": type(error).__name__})
        except Exception as error:  # the parent decides what a failure means
            send(pipe_out, {"ok": False, "error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
