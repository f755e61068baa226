"""The child process that runs SavedModels and Keras models as they are, for `paring.measure`; the parent is a `Worker`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from paring.formats import keras as keras_format
from paring.formats.saved_model import session
from paring.measure.latency import latency
from paring.runtime.worker import Server, serve

_PROGRAM = """
import sys
sys.path[:] = [path for path in sys.path if path]
from paring.formats.run_child import main
main({saved_model!r})
"""


def program(source: Path) -> str:
    """What the child runs. Its path lacks the working folder: a random.py there is not TensorFlow's to import."""
    return _PROGRAM.format(saved_model=source.is_dir())


class FrameworkServer(Server):
    """Answers as `Server` does, for models of TensorFlow and Keras."""

    def __init__(self, saved_model: bool) -> None:
        super().__init__()
        self.room = session if saved_model else keras_format

    def limit(self, extra: int, threads: int = 1) -> dict[str, Any]:
        """Imports the framework, so that its memory is not counted as the model's; sets no limits.

        These models are the user's own, and how much the framework takes for them nobody can say beforehand.
        """
        self.room.start()
        return {}

    def load(self, name: str, path: str, kernels: str, threads: int, stream: bool) -> dict[str, Any]:
        """Loads a SavedModel folder or a Keras file under a name; threads are set by the environment."""
        self.sessions[name] = self.room.Session(Path(path))
        return {}

    def enter(self, name: str, source: str, signature: str, inputs: list[str], outputs: list[str]) -> dict[str, Any]:
        """Another signature of a loaded SavedModel, under a name of its own; inputs and outputs in its own order."""
        del inputs, outputs
        self.sessions[name] = self.sessions[source].enter(signature)
        return {}

    def seal(self, path: str) -> dict[str, Any]:
        """Writes the fingerprint of a SavedModel folder."""
        session.seal(Path(path))
        return {}

    def probe(self, name: str, path: str, points: list[list[Any]], exact: str) -> dict[str, Any]:
        """Loads a SavedModel to look into; `exact` names the float model's probe, where it was made of that."""
        from paring.formats.saved_model.probe import Point, Probe

        found = [Point(scope, node, tuple(inputs)) for scope, node, inputs in points]
        self.sessions[name] = Probe(Path(path), found, self.sessions[exact] if exact else None)
        return {}

    def sense(
        self, name: str, signature: str, wanted: list[int], inputs: bool, arrays: list[np.ndarray]
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Runs a sample -> the outputs, and what the wanted points gave, in the model and alone; or what they read."""
        probe = self.sessions[name]
        outputs = probe.run(signature, arrays, wanted)
        results = [probe.read(number) if inputs else probe.results[number] for number in wanted]
        seen = [results, [probe.alone[number] for number in wanted]]
        counts = [[len(values) for values in part] for part in seen]
        more = [value for part in seen for values in part for value in values]
        return {"outputs": len(outputs), "counts": counts, "sizes": probe.sizes}, [*outputs, *more]

    def time(self, names: list[str], rounds: int, arrays: list[np.ndarray]) -> dict[str, Any]:
        """Latency of several loaded models on one sample, interleaved round by round."""
        for name in names:
            self.sessions[name].run(arrays)
        found = latency({name: self.sessions[name].again for name in names}, rounds=rounds)
        return {"latency": {name: asdict(value) for name, value in found.items()}}

    def describe(self, name: str) -> dict[str, Any]:
        """What a model takes and gives."""
        found: dict[str, Any] = self.sessions[name].describe()
        return found


def main(saved_model: bool) -> None:
    """Serves until the parent closes the pipe."""
    serve(FrameworkServer(saved_model))
