"""`compare` for SavedModels: every layer with weights, in function bodies, branches and loops, accumulated and alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from paring.errors import InputError
from paring.folders.signatures import for_wire, samples_of
from paring.formats.saved_model.flow import Source
from paring.formats.saved_model.inside import Form, Layers, form_of
from paring.formats.saved_model.model import RECORD, SavedModel
from paring.formats.saved_model.view import values
from paring.graph import Graph, Op, TensorId
from paring.measure.noise import Growing, Noise, channel_db, decibel, error
from paring.measure.result import Comparison, Error, Layer
from paring.measure.subject import start_framework
from paring.measure.units import Unit
from paring.measure.verdict import score, verdict
from paring.measure.watch import BUDGET, Seen
from paring.measure.whole import Tally
from paring.recipe import Recipe
from paring.runtime import RunError, Worker
from paring.samples import Sample


def compare_folders(
    source: Any,
    optimized: Any,
    data: Any = None,
    *,
    labels: Any = None,
    image_range: Any = None,
    limit: int | None = None,
    progress: Callable[[int], None] | None = None,
    histograms: bool = True,
) -> Comparison:
    """Compares a SavedModel with the one it was made from; arguments and errors as those of `compare`.

    Layers are matched by the names of functions and operators, which paring keeps. Each is fed with what it read in the float
    model, every execution of it, so what it adds is its own error.
    """
    if data is None and labels is not None:
        raise InputError("labels without samples", todo="Give samples (--data)")
    models = SavedModel.open(source), SavedModel.open(optimized)
    for key in models[0].signatures():
        if key not in models[1].signatures():
            raise InputError(
                "the models do not correspond", where=f"signature {key}", expected="the same signature",
                got=", ".join(models[1].signatures()) or "none",
            )  # fmt: skip
    layers = Layers.of(*models)
    if not layers.paired:
        raise InputError(
            "the models do not correspond", where=str(optimized), expected="operators named as in the float model",
            got="none", todo="Compare what paring wrote, or another tool that keeps names",
        )  # fmt: skip
    samples, notes = samples_of(models[0], data, labels=labels, limit=limit, image_range=image_range)
    run = _Run(models, layers, data is not None, notes)
    run.measure(samples, progress or (lambda done: None))
    return run.finish(histograms)


@dataclass
class _Run:
    """Collects what is measured, signature by signature."""

    models: tuple[SavedModel, SavedModel]
    layers: Layers
    given: bool
    notes: list[str]
    seen: dict[int, Seen] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)
    samples: int = 0
    known: dict[tuple[Any, ...], set[int]] = field(default_factory=dict)

    def measure(self, samples: Mapping[str, Iterable[Sample]], progress: Callable[[int], None]) -> None:
        """Runs both models, some layers at a time so that memory stays bounded."""
        points = [(p.scope, p.node, p.inputs) for p in self.layers.points]
        done = 0
        with start_framework(self.models[0].path, 1) as worker:
            worker.probe("source", self.models[0].path, points, "")
            worker.probe("optimized", self.models[1].path, points, "source")
            for key, given in samples.items():
                parts = self._parts(worker, key, given)
                for number, part in enumerate(parts):
                    labels = getattr(given, "labels", None) if not number else None
                    for sample in given:
                        self._sample(worker, key, sample, part, labels, first=not number, several=len(samples) > 1)
                        done += 1
                        progress(done)

    def _parts(self, worker: Worker, key: str, given: Iterable[Sample]) -> list[list[int]]:
        """The layers that this signature runs, in groups whose values fit into memory; a first sample tells their sizes."""
        first = next(iter(given), None)
        if first is None:
            raise InputError("cannot compare", expected="at least one sample", got="an empty data set")
        try:
            sizes = worker.sense("source", key, for_wire(first), ()).sizes
        except RunError as why:
            if self.given:
                raise InputError(
                    "the float model does not run on the data", where=f"signature {key}", got=str(why)
                ) from why
            said = f"the float model does not run on made-up inputs ({str(why).rstrip('.')})"
            self.notes.append(f"signature {key} was not run: {said}")
            return []
        inputs = tuple(self.models[0].signatures()[key][0])
        run = {number for number, size in enumerate(sizes) if size}
        if run and run <= self.known.get(inputs, set()):  # Keras exports one function under two names
            return [[]]
        self.known.setdefault(inputs, set()).update(run)
        parts: list[list[int]] = [[]]
        held = 0.0
        for number, size in enumerate(sizes):
            if parts[-1] and held + 4 * size > BUDGET:
                parts.append([])
                held = 0.0
            if number in self.layers.paired:  # what it sees is not known beforehand: a later sample may run it
                parts[-1].append(number)
                held += 4 * size
        return parts

    def _sample(
        self, worker: Worker, key: str, sample: Sample, part: Sequence[int], labels: Any, *, first: bool, several: bool
    ) -> None:
        arrays = for_wire(sample)
        exact, got = (worker.sense(name, key, arrays, part) for name in ("source", "optimized"))
        for number in part:
            ran = exact.results[number], got.results[number]
            if not ran[0]:
                continue
            seen = self.seen.setdefault(number, Seen([Noise()], [Noise()], [Noise()], []))
            if len(ran[0]) != len(ran[1]):
                turns = f"{len(ran[1])} times and {len(ran[0])} times in the float model"
                seen.note = f"it ran {turns}; the first ones were compared"
            if not got.alone[number]:
                seen.note = seen.note or "it was not run alone: what it reads has another name in the optimized model"
            for x, y in zip(*ran, strict=False):
                _update(seen, seen.accumulated, x, y)
                seen.activation.update(_real(x))
            for x, y in zip(ran[0], got.alone[number], strict=False):
                _update(seen, seen.own, x, y)
        if not first:
            return
        self.samples += 1
        names = [port.name for port in self.models[0].signatures()[key][1]]
        theirs = [port.name for port in self.models[1].signatures()[key][1]]
        for name, x in zip(names, exact.outputs, strict=True):
            if name not in theirs:
                raise InputError(
                    "the models do not correspond", where=f"output {name}", expected="the same outputs",
                    got=", ".join(theirs),
                )  # fmt: skip
            tally = self.tallies.setdefault(f"{key}/{name}" if several else name, Tally(Noise()))
            tally.update(x, got.outputs[theirs.index(name)], labels)

    # -- telling -----------------------------------------------------------------------------------------------------

    def finish(self, histograms: bool) -> Comparison:
        """Puts everything together."""
        graph = self.layers.view.graph
        index = _links(graph, [op.outputs for op in self.layers.ops])
        recipe, rules, why = _recipe_of(self.models[1], graph)
        made = [self._layer(number, op, index[number], rules, histograms) for number, op in enumerate(self.layers.ops)]
        units = [Unit((op,), (), op.outputs, op.kind, (), None) for op in self.layers.ops]
        told = verdict(made, units, [None] * len(made))
        made = [
            replace(layer, note="; ".join(filter(None, (told.causes.get(n), layer.note))))
            for n, layer in enumerate(made)
        ]
        notes = [*self.notes, *why]
        if not self.given:
            notes.insert(
                0, "the samples were made up, so no layer is blamed: give some (--data) to see what real ones show"
            )
        outputs = {name: found for name, tally in self.tallies.items() if (found := error([tally.noise])) is not None}
        for name, tally in self.tallies.items():
            if tally.rows and tally.labelled:
                before, after = tally.right / tally.rows
                notes.append(f"output {name}: {before:.1%} right in float, {after:.1%} optimized")
        return Comparison(
            source=str(self.models[0].path), optimized=str(self.models[1].path), samples=self.samples, given=self.given,
            layers=tuple(made), ranking=told.ranking, outputs=outputs,
            agreement={name: tally.same / tally.rows for name, tally in self.tallies.items() if tally.rows},
            recipe=recipe, exempt=told.exempt if self.given else "", unmatched=self.layers.strangers,
            notes=tuple(dict.fromkeys(notes)), culprits=told.culprits if self.given else (),
        )  # fmt: skip

    def _layer(self, number: int, op: Op, reads: tuple[int, ...], rules: Mapping[str, int], histograms: bool) -> Layer:
        made = Layer(op.name, op.native, inputs=reads, shape=self.layers.view.graph.tensors[op.outputs[0]].shape)
        if number not in self.layers.paired:
            return replace(made, note="it has no counterpart")
        source = self.layers.view.sources[op.id][0]
        form = form_of(self.models, self.layers, number)
        made = replace(
            made, optimized=op.name, matched="name", form=form.name, rule=rules.get(op.name),
            weight_db=_weight_db(self.models[0], source, form),
            weights=_histogram(self.models[0], source) if histograms else None,
        )  # fmt: skip
        seen = self.seen.get(number)
        if seen is None:
            return replace(made, note="no sample ran it")
        own: Error | None = error(seen.own)
        return replace(
            made, own=own, accumulated=error(seen.accumulated), blame=score(own, op.kind), note=seen.note,
            activation=seen.activation.histogram(None) if histograms else None,
        )  # fmt: skip


def _update(seen: Seen, noises: list[Noise], x: np.ndarray, y: np.ndarray) -> None:
    if x.size != y.size:
        seen.note = f"its result has {y.size} elements and {x.size} in the float model"
    else:
        noises[0].update(_real(x), _real(y).reshape(x.shape))


def _real(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float32)


def _links(graph: Graph, results: Sequence[tuple[TensorId, ...]]) -> list[tuple[int, ...]]:
    """Of each layer the layers that it reads from, through whatever lies between them in the same function."""
    makers = graph.producers()
    layer = {tensor: number for number, made in enumerate(results) for tensor in made}

    def behind(op: Op) -> Iterator[int]:
        stack, done = [t for t in op.inputs if t is not None], set[TensorId]()
        while stack:
            tensor = stack.pop()
            if tensor in done:
                continue
            done.add(tensor)
            if tensor in layer:
                yield layer[tensor]
            elif tensor in makers:
                stack += [t for t in makers[tensor].inputs if t is not None]

    return [tuple(sorted(set(behind(makers[made[0]])) - {number})) for number, made in enumerate(results)]


def _weight_db(model: SavedModel, source: Source, form: Form) -> float | None:
    """Signal to noise of the stored weights, in dB, of all or of the median channel; None where what is stored is not known."""
    found = None
    exact = np.asarray(values(model, source), np.float32)
    summed = tuple(d for d in range(exact.ndim) if d not in (form.kept or (exact.ndim - 1,)))
    for decoded in form.decoded:
        noise = np.square(decoded() - exact, dtype=np.float64).sum(axis=summed).reshape(-1)
        signal = np.square(exact, dtype=np.float64).sum(axis=summed).reshape(-1)
        level = min(decibel(float(signal.sum()), float(noise.sum())), channel_db(signal, noise))
        found = level if found is None else max(found, level)
    return found


def _histogram(model: SavedModel, source: Source) -> Any:
    found = Growing()
    if prod(source.shape or ()):
        found.update(np.asarray(values(model, source), np.float32))
    return found.histogram(None)


def _recipe_of(optimized: SavedModel, graph: Graph) -> tuple[dict[str, Any] | None, dict[str, int], list[str]]:
    """The recipe in the optimized folder -> it, the index of each operator's rule by name, what went wrong."""
    file = Path(optimized.path) / RECORD
    if not file.is_file():
        return None, {}, []
    try:
        data = json.loads(file.read_text(encoding="utf-8"))["recipe"]
        matched = Recipe.load(dict(data)).match(graph)
    except (OSError, ValueError, TypeError, KeyError, RecursionError, InputError) as why:
        return None, {}, [f"the recipe in {RECORD} does not fit the float model: {why}"]
    reasons = {op.name: matched[op.id][1] for op in graph.ops}
    rules = {name: int(why.split()[1]) - 1 for name, why in reasons.items() if re.fullmatch(r"rule \d+", why)}
    return data, rules, []


__all__ = ["compare_folders"]
