"""What a search works on: a `.tflite` file, or a SavedModel that becomes another one."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from paring.calibrate import calibrate, limits
from paring.calibration import HISTOGRAM, RANGE, Statistics
from paring.compress.quantize import Quantize
from paring.data import Feed, feeds
from paring.decision import Plan
from paring.errors import InputError, UnsupportedError
from paring.folders.native import Packing
from paring.folders.planning import planned, readers_of, twins_of
from paring.folders.signatures import for_wire
from paring.formats.saved_model.model import SavedModel, folder_bytes
from paring.formats.saved_model.view import view as folder_view
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.sink import sink
from paring.formats.tflite.view import view
from paring.graph import Graph, TensorId
from paring.grids import Propagation
from paring.measure.evaluate import Evaluation, collect, evaluate, score
from paring.measure.latency import Latency
from paring.measure.metrics import Metric
from paring.measure.subject import start_framework
from paring.optimize import Result, optimize
from paring.plan import plan
from paring.recipe import Recipe, Rule
from paring.runtime import RunError, Worker
from paring.samples import TensorSpec, open_samples
from paring.solve import requests
from paring.tuning.schemes import choices, patterns
from paring.tuning.store import stored

Data: TypeAlias = Recipe | Mapping[str, Any]
FILE, FOLDER, CALIBRATION, STATISTICS = "float.tflite", "float", "calibration.samples", "statistics.npz"


class Subject(ABC):
    """A float model that a search tries recipes on.

    Attributes:
      path: What errors call it.
      kept: Its name in the folder that all trials share.
      suffix: Of what is made of it.
      graph: Its operators.
    """

    path: str
    kept: str
    suffix: str
    graph: Graph

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Puts it where all trials see it."""

    @abstractmethod
    def feed(self, data: Any, *, labels: Any = None, limit: int | None = None, image_range: Any = None) -> Feed:
        """Samples for its only entry."""

    @abstractmethod
    def layers(self, offered: Mapping[str, Quantize], skip: Sequence[str]) -> dict[str, dict[str, Quantize]]:
        """By layer, the schemes that make a difference to it."""

    @abstractmethod
    def names(self) -> dict[str, str]:
        """By layer, a regular expression that matches what has to be told the same."""

    @abstractmethod
    def calibrate(self, folder: Path, offered: Mapping[str, Quantize], skip: Sequence[str]) -> None:
        """Keeps what all trials need to know of the samples."""

    @abstractmethod
    def make(
        self,
        folder: Path,
        recipe: Recipe | Mapping[str, Any],
        output: Path,
        *,
        final: bool = False,
        overwrite: bool = False,
    ) -> Result:
        """Writes the model of a recipe; it is verified at the end of a search only."""

    @abstractmethod
    def evaluate(
        self, file: Path, feed: Feed, metric: Metric | None, reference: Mapping[str, Any] | None = None
    ) -> Evaluation:
        """Scores the float model, or one that was made of it."""

    @abstractmethod
    def time(self, files: Mapping[str, Path], sample: list[Any], rounds: int) -> dict[str, Latency]:
        """The median latency of models side by side."""

    @abstractmethod
    def plain_bytes(self, folder: Path) -> int:
        """Bytes of what a recipe without rules makes of it: what layers save is counted from there."""


class TfliteSubject(Subject):
    """A `.tflite` file, or what was converted to one."""

    kept, suffix = FILE, ".tflite"

    def __init__(self, model: TfliteModel) -> None:
        """Takes the model over.

        Raises:
          UnsupportedError: It has several signatures.
        """
        if len(model.root.signature_defs or ()) > 1:
            raise UnsupportedError("cannot tune a model with several signatures", where=model.path, expected="one")
        self.model, self.path = sink(model), model.path
        self.graph = view(self.model, fold_ranges=True)

    def save(self, folder: Path) -> None:
        """Writes the file."""
        self.model.save(folder / FILE)

    def feed(self, data: Any, *, labels: Any = None, limit: int | None = None, image_range: Any = None) -> Feed:
        """Samples for the first entry."""
        return feeds(self.model, data, labels=labels, image_range=image_range, limit=limit)[0]

    def layers(self, offered: Mapping[str, Quantize], skip: Sequence[str]) -> dict[str, dict[str, Quantize]]:
        """As planned."""
        return choices(self.graph, offered, skip)

    def names(self) -> dict[str, str]:
        """One for each operator."""
        return patterns(op.name for op in self.graph.ops)

    def calibrate(self, folder: Path, offered: Mapping[str, Quantize], skip: Sequence[str]) -> None:
        """Statistics for every scheme on every layer, in one pass.

        Where layers differ in scheme, tensors keep a range of their own that take over another's where they do not: all that
        some static scheme reads or makes is looked at.
        """
        wanted: dict[TensorId, set[str]] = {}
        ranges = {RANGE} if all(s.range == "minmax" for s in offered.values() if s.static) else {RANGE, HISTOGRAM}
        for settings in offered.values():
            made = plan(self.graph, Recipe((Rule((settings,), kind="*"),), "all").restricted(skip))
            for tensor, parts in requests(made).items():
                wanted.setdefault(tensor, set()).update(parts)
            spread = Propagation(made, settings.activations)
            for tensor in (t for node in (*spread.makers, *spread.users) for t in spread.members(node)):
                wanted.setdefault(tensor, set()).update(ranges)
        (folder / STATISTICS).unlink(missing_ok=True)  # those of an earlier run
        if wanted:
            found = calibrate(self.model, self.graph, wanted, feeds(self.model, stored(folder / CALIBRATION)))
            found.save(folder / STATISTICS)

    def make(
        self,
        folder: Path,
        recipe: Recipe | Mapping[str, Any],
        output: Path,
        *,
        final: bool = False,
        overwrite: bool = False,
    ) -> Result:
        """With the run's samples and statistics."""
        file = folder / STATISTICS
        statistics = Statistics.load(file) if file.exists() else None
        chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(dict(recipe))
        return optimize(
            self.model, chosen, stored(folder / CALIBRATION), output=output, overwrite=overwrite, statistics=statistics,
            verified=final,
        )  # fmt: skip

    def evaluate(
        self, file: Path, feed: Feed, metric: Metric | None, reference: Mapping[str, Any] | None = None
    ) -> Evaluation:
        """On LiteRT."""
        model = self.model if file.name == FILE else TfliteModel.open(file)
        return evaluate(model, feed, metric, reference=reference, path=file, name=self.path)

    def time(self, files: Mapping[str, Path], sample: list[Any], rounds: int) -> dict[str, Latency]:
        """On LiteRT."""
        with Worker(limits(*[self.model] * len(files), sample=sample), threads=1) as worker:
            for name, file in files.items():
                worker.load(name, file)
            return worker.time([*files], sample, rounds=rounds)

    def plain_bytes(self, folder: Path) -> int:
        """Of the file."""
        return (folder / FILE).stat().st_size


class FolderSubject(Subject):
    """A SavedModel; what is made of it has stock operators, or paring's own where the `runtime` is native."""

    kept, suffix = FOLDER, ""

    def __init__(self, path: Path, name: str, runtime: str = "portable") -> None:
        """Opens the folder.

        Raises:
          InputError: It is no SavedModel, or has no signature.
          UnsupportedError: It has several signatures with inputs of their own.
        """
        self.path, self.runtime = name, runtime
        self.model = SavedModel.open(path)
        signatures = self.model.signatures()
        if not signatures:
            raise InputError("cannot tune", where=name, expected="a signature", got="none")
        self.key = "serving_default" if "serving_default" in signatures else next(iter(signatures))
        ports = signatures[self.key][0]
        if any(inputs != ports for inputs, _ in signatures.values()):
            raise UnsupportedError(
                "cannot tune a model with several signatures", where=name, expected="one, or equal inputs"
            )
        if any(port.shape is None for port in ports):
            raise UnsupportedError("cannot tune", where=name, expected="inputs of known rank")
        self.specs = {port.name: TensorSpec(port.name, port.shape or (), port.dtype) for port in ports}
        self.view, self.twins = folder_view(self.model), twins_of(self.model)
        self.graph = self.view.graph

    def save(self, folder: Path) -> None:
        """Links the folder's files, or copies them where that is not possible."""
        target = folder / FOLDER
        shutil.rmtree(target, ignore_errors=True)

        def link(one: str, other: str) -> None:
            try:
                os.link(one, other)
            except OSError:
                shutil.copy2(one, other)

        shutil.copytree(self.model.path.resolve(), target, copy_function=link)

    def feed(self, data: Any, *, labels: Any = None, limit: int | None = None, image_range: Any = None) -> Feed:
        """Samples for the default signature."""
        name = self.key if len(self.model.signatures()) > 1 else None
        samples = open_samples(
            data, self.specs, labels=labels, limit=limit, image_range=image_range, signature_name=name
        )
        outputs = tuple(port.name for port in self.model.signatures()[self.key][1])
        return Feed(0, tuple(self.specs), samples, outputs, signature=self.key)

    def planned(self, recipe: Recipe) -> Plan:
        """What the recipe makes of each operator."""
        seats = Packing.of(self.model, self.view, self.twins).seats if self.runtime == "native" else None
        return planned(self.view, recipe, recipe.winners(self.graph), self.twins, seats)

    def layers(self, offered: Mapping[str, Quantize], skip: Sequence[str]) -> dict[str, dict[str, Quantize]]:
        """As planned; of operators that share a weight the first one stands for all."""
        found = choices(self.graph, offered, skip, self.planned)
        leaders = {group[0] for group in self._groups()}
        return {layer: own for layer, own in found.items() if layer in leaders}

    def names(self) -> dict[str, str]:
        """One for each group of operators that share weights, and one for each other operator."""
        plain = patterns(op.name for op in self.graph.ops)
        groups = {group[0]: "|".join(plain[name] for name in group) for group in self._groups()}
        return plain | groups

    def _groups(self) -> list[list[str]]:
        """Operators that share weights, also through others, by name; in order."""
        names = {op.id: op.name for op in self.graph.ops}
        groups: list[list[str]] = []
        for _, readers in readers_of(self.view, self.twins).values():
            mine = [names[op] for op in readers]
            joined = [group for group in groups if set(group) & set(mine)]
            groups = [group for group in groups if group not in joined]
            groups.append([*dict.fromkeys([name for group in joined for name in group] + mine)])
        order = {op.name: place for place, op in enumerate(self.graph.ops)}
        return sorted((sorted(group, key=order.__getitem__) for group in groups), key=lambda group: order[group[0]])

    def calibrate(self, folder: Path, offered: Mapping[str, Quantize], skip: Sequence[str]) -> None:
        """Nothing: what a recipe needs to know of the samples depends on it."""

    def make(
        self,
        folder: Path,
        recipe: Recipe | Mapping[str, Any],
        output: Path,
        *,
        final: bool = False,
        overwrite: bool = False,
    ) -> Result:
        """With the run's samples."""
        chosen = recipe if isinstance(recipe, Recipe) else Recipe.load(dict(recipe))
        return optimize(
            self.model.path, chosen, stored(folder / CALIBRATION), output=output, overwrite=overwrite, verified=final,
            runtime=self.runtime,
        )  # fmt: skip

    def evaluate(
        self, file: Path, feed: Feed, metric: Metric | None, reference: Mapping[str, Any] | None = None
    ) -> Evaluation:
        """In TensorFlow."""
        try:
            with start_framework(file, 0) as worker:
                worker.load("whole", file)
                worker.enter("model", "whole", self.key, [], [])
                samples = (for_wire(dict(zip(feed.names, sample, strict=True))) for sample in feed)
                outputs = collect(worker, "model", samples, worker.describe("model")["outputs"], lambda value, _: value)
        except RunError as error:
            raise RunError("cannot run the model", where=self.path, got=str(error).rstrip(".")) from error
        return score(outputs, feed.samples.labels, metric, reference=reference, name=self.path)

    def time(self, files: Mapping[str, Path], sample: list[Any], rounds: int) -> dict[str, Latency]:
        """In TensorFlow."""
        given = for_wire(dict(zip(self.specs, sample, strict=True)))
        with start_framework(next(iter(files.values())), 1) as worker:
            for name, file in files.items():
                worker.load(f"{name} whole", file)
                worker.enter(name, f"{name} whole", self.key, [], [])
            return worker.time([*files], given, rounds=rounds)

    def plain_bytes(self, folder: Path) -> int:
        """Of the folder without what Keras stores twice."""
        twins = sum(4 * self.model.flow.sources[twin].size for twin in self.twins)
        return folder_bytes(folder / FOLDER) - twins


def open_kept(folder: Path, name: str, runtime: str = "portable") -> Subject:
    """The float model in the folder that all trials share."""
    if (folder / FOLDER).is_dir():
        return FolderSubject(folder / FOLDER, name, runtime)
    model = TfliteModel.open(folder / FILE)
    model.path = name or model.path
    return TfliteSubject(model)


def bytes_of(path: Path) -> int:
    """Of a file, or of all files in a folder."""
    return folder_bytes(path) if path.is_dir() else path.stat().st_size


__all__ = ["FolderSubject", "Subject", "TfliteSubject", "bytes_of", "open_kept"]
