"""`compare`: the error of every layer of an optimized model, accumulated and its own, ranked by what the layer adds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paring.data import Feed, feeds
from paring.errors import InputError
from paring.formats import load
from paring.formats.saved_model.model import is_saved_model
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.sink import sink
from paring.formats.tflite.view import entries, view
from paring.graph import Graph, TensorId
from paring.measure.constants import shared, weight_db, weight_histogram
from paring.measure.cuts import Cut, Cutter, unit_form
from paring.measure.folders import compare_folders
from paring.measure.match import STRUCTURE, Entry, Matching, Pair, Port, match, ports
from paring.measure.noise import error
from paring.measure.result import Comparison, Error, Layer
from paring.measure.units import Unit, units
from paring.measure.verdict import recipe_of, score, verdict
from paring.measure.watch import Seen, Side, Watcher, followable
from paring.measure.whole import Whole


def compare(
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
    """Compares an optimized model with the float model it was made from, layer by layer.

    The optimized file may come from any tool: layers are matched by the structure of the graphs. Both models run in a
    child process. Nothing is kept of a sample but sums. Of two SavedModels it is the layers with weights that are compared, by
    name, as TensorFlow runs them.

    Args:
      source: The float model: what `paring.load` takes.
      optimized: The optimized one.
      data: Samples (see `paring.samples.open_samples`); None makes some up, which says little about real ones.
      labels: Classes, for the accuracy of both models in the notes.
      image_range: For a folder of images and a float input: the values of pixels 0 and 255.
      limit: At most so many samples.
      progress: Called with the number of samples done, over all passes.
      histograms: Keep histograms of activations and weights.

    Raises:
      InputError: The models do not correspond; says which input, output or layer differs. Or bad data.
      RunError: A model cannot be run.

    >>> from paring.demo import load_digits, model_path
    >>> from paring.optimize import optimize
    >>> images = load_digits()[0][:4]
    >>> int8 = optimize(model_path(), "int8", images, verified=False).model
    >>> found = compare(model_path(), int8, images)
    >>> found.layers[found.ranking[0]].blame < found.layers[found.ranking[-1]].blame
    True
    """
    if is_saved_model(source) and is_saved_model(optimized):
        return compare_folders(
            source, optimized, data, labels=labels, image_range=image_range, limit=limit, progress=progress,
            histograms=histograms,
        )  # fmt: skip
    models = sink(load(source)), sink(load(optimized))
    graphs = view(models[0], densify=True), view(models[1], densify=True)
    pairs = _entries(models, graphs)
    matching = match(*graphs, [entry for _, entry in pairs])
    if data is None and labels is not None:
        raise InputError("labels without samples", todo="Give samples (--data)")
    given = feeds(models[0], data, labels=labels, image_range=image_range, limit=limit)
    made = _Maker(models, graphs, matching, histograms)
    done = [0]

    def step() -> None:
        done[0] += 1
        if progress is not None:
            progress(done[0])

    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        for feed in given:
            entry = next(e for _, e in pairs if e.source == feed.subgraph)
            prefix = f"{feed.signature}/" if len(given) > 1 else ""
            made.entry(feed, entry, prefix, Path(folder), step)
    return made.finish(given)


def _entries(models: tuple[TfliteModel, TfliteModel], graphs: tuple[Graph, Graph]) -> list[tuple[str, Entry]]:
    """The entries of both models, by the names of their signatures; where each has one, the names do not matter."""
    a, b = (dict(entries(model)) for model in models)
    if len(a) != 1 or len(b) != 1:
        for key in a:
            if key not in b:
                raise InputError(
                    "the models do not correspond", where=f"signature {key or '(none)'}", expected="the same signature",
                    got=", ".join(name or "(none)" for name in b),
                )  # fmt: skip
    found, seen = [], set()
    for (key, (number, ins, outs)), other in zip(a.items(), b if len(b) == 1 else a, strict=False):
        theirs, ins_b, outs_b = b[other]
        if number in seen:
            continue
        seen.add(number)
        sides = [
            ports(*graphs, what, _ids(number, mine, models[0], part), _ids(theirs, yours, models[1], part))
            for what, part, mine, yours in (("input", "inputs", ins, ins_b), ("output", "outputs", outs, outs_b))
        ]
        found.append((key, Entry(sides[0], sides[1], number, theirs)))
    return found


def _ids(number: int, named: Mapping[str, int], model: TfliteModel, part: str) -> dict[str, TensorId]:
    """Tensors by name, in the subgraph's own order."""
    order = [int(i) for i in getattr(model.subgraphs[number], part)]
    ranked = sorted(named.items(), key=lambda item: order.index(item[1]) if item[1] in order else len(order))
    return {name: (number, index) for name, index in ranked}


@dataclass
class _Maker:
    """Collects what is measured, entry by entry."""

    models: tuple[TfliteModel, TfliteModel]
    graphs: tuple[Graph, Graph]
    matching: Matching
    histograms: bool
    cuts: list[Cut] = field(default_factory=list)
    seen: dict[Cut, Seen] = field(default_factory=dict)
    outputs: dict[str, Error] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples: int = 0

    def entry(self, feed: Feed, entry: Entry, prefix: str, folder: Path, step: Callable[[], None]) -> None:
        """Measures one entry and the bodies it runs."""
        whole = Whole(self.models, self.graphs, self.matching, feed, entry)
        outcome = whole.run(folder, step)
        kernels = outcome.kernels
        self.outputs |= {prefix + name: found for name, found in outcome.errors.items()}
        self.agreement |= {prefix + name: share for name, share in outcome.agreement.items()}
        self.notes += outcome.notes
        self.samples += outcome.samples
        sides = tuple(
            Side(model, graph, number, how)
            for model, graph, number, how in zip(
                self.models, self.graphs, (entry.source, entry.optimized), kernels, strict=True
            )
        )
        cutter = Cutter(self.graphs[0], self.graphs[1], self.matching)
        places = _places(self.matching, entry)
        followed = []
        for place in places[1:]:
            why = followable(sides[0], {place[0]}, folder) or followable(sides[1], {place[1]}, folder)
            followed += [] if why else [place]
            self.notes += [f"loops and branches were compared as a whole: {why}"] if why else []
        for place in places:
            first = place == places[0]
            inside = [
                [(n, int(i)) for i in model.subgraphs[n].inputs] for n, model in zip(place, self.models, strict=True)
            ]
            for given, tensors in zip(cutter.given, inside, strict=True):
                given.update(tensors)
            inner = tuple(Port("", a, b) for a, b in zip(*inside, strict=False))
            self.cuts += cutter.inputs(place, entry.inputs if first else inner, entry=first)
        known = {id(cut.pair) for cut in self.cuts if cut.pair is not None}
        self.cuts += [c for c in cutter.layers(followed) if c.place in places and id(c.pair) not in known]
        wanted = [c for c in self.cuts if c not in self.seen and (c.place == places[0] or c.place in followed)]
        self.seen |= Watcher(sides[0], sides[1], whole.samples, folder, step).measure(wanted)

    def finish(self, given: Sequence[Feed]) -> Comparison:
        """Puts everything together."""
        order: list[tuple[Unit | None, Cut | None]] = [(None, cut) for cut in self.cuts if cut.pair is None]
        by_unit = {id(cut.pair.source): cut for cut in self.cuts if cut.pair is not None}
        lost, found = self._strangers()
        every = [pair.source for pair in self.matching.pairs] + lost
        every.sort(key=lambda unit: unit.head.id)
        order += [(unit, by_unit.get(id(unit))) for unit in every]
        paired = {id(pair.source): pair for pair in self.matching.pairs}
        index = {t: n for n, (unit, _) in enumerate(order) if unit is not None for t in unit.results}
        index |= {a: n for n, (unit, cut) in enumerate(order) if unit is None and cut for a, _ in cut.results}
        layers = tuple(self._layer(unit, cut, paired.get(id(unit)), index) for unit, cut in order)
        recipe, rules, why = recipe_of(self.models[1], self.models[0])
        layers = tuple(
            replace(layer, rule=rules.get(unit.name)) if unit is not None else layer
            for layer, (unit, _) in zip(layers, order, strict=True)
        )
        families = ["" if unit is None else unit.family for unit, _ in order]
        rounding = [
            score(error(self.seen[cut].rounding), family) if cut in self.seen else None
            for family, (_, cut) in zip(families, order, strict=True)
        ]
        told = verdict(layers, [unit for unit, _ in order], rounding)
        layers = tuple(
            replace(layer, note="; ".join(filter(None, (told.causes.get(n), layer.note))))
            for n, layer in enumerate(layers)
        )
        notes = [*self.models[0].notes, *self.notes, *(n for f in given for n in f.samples.notes), *why]
        real = all(feed.given for feed in given)
        if not real:
            notes.insert(
                0, "the samples were made up, so no layer is blamed: give some (--data) to see what real ones show"
            )
        return Comparison(
            source=self.models[0].path, optimized=self.models[1].path, samples=self.samples,
            given=real, layers=layers, ranking=told.ranking, outputs=self.outputs,
            agreement=self.agreement, recipe=recipe, exempt=told.exempt if real else "",
            unmatched=tuple(unit.name for unit in found),
            notes=tuple(dict.fromkeys(notes)), culprits=told.culprits if real else (),
        )  # fmt: skip

    def _strangers(self) -> tuple[list[Unit], list[Unit]]:
        """Units without a counterpart, those of bodies that were not entered included."""
        found = []
        for which, left in enumerate((self.matching.source_only, self.matching.optimized_only)):
            entered = {place[which] for place in self.matching.sides}
            inner = {op.id[0] for op in self.graphs[which].ops} - entered
            found.append([*left, *(u for n in sorted(inner) for u in units(self.graphs[which], n).units)])
        return found[0], found[1]

    def _layer(self, unit: Unit | None, cut: Cut | None, pair: Pair | None, index: Mapping[TensorId, int]) -> Layer:
        seen = self.seen.get(cut) if cut is not None else None
        made = Layer(unit.name if unit is not None else "", unit.head.native if unit is not None else "INPUT")
        notes = [cut.note if cut is not None else "it has no counterpart"]
        if seen is not None and cut is not None:
            notes.append(seen.note)
            made = replace(
                made, own=error(seen.own), accumulated=error(seen.accumulated),
                blame=score(error(seen.blame), unit.family if unit is not None else ""),
                activation=seen.activation.histogram(seen.accumulated[0].grid) if self.histograms else None,
            )  # fmt: skip
        made = replace(made, note="; ".join(n for n in notes if n))
        if unit is None:
            assert cut is not None
            ours, theirs = cut.results[0]
            form, shape = self.graphs[1].tensors[theirs].dtype, self.graphs[0].tensors[ours].shape
            return replace(made, name=cut.name, optimized=cut.name, matched=STRUCTURE, form=form, shape=shape)
        reads = tuple(dict.fromkeys(index[t] for t in unit.reads if t in index))
        made = replace(made, shape=self.graphs[0].tensors[unit.results[0]].shape, inputs=reads)
        if pair is None:
            return made
        return replace(
            made, optimized=pair.optimized.name, matched=pair.how, form=unit_form(self.graphs[1], pair.optimized),
            weight_db=weight_db(self.graphs, pair.source, pair.optimized), shared=shared(pair.optimized),
            weights=weight_histogram(pair.source, pair.optimized) if self.histograms else None,
        )  # fmt: skip


def _places(matching: Matching, entry: Entry) -> list[tuple[int, int]]:
    """The entry's pair of subgraphs, then those of the loops and branches it runs."""
    found = [(entry.source, entry.optimized)]
    for place in found:
        for pair in matching.pairs:
            if (pair.source.head.id[0], pair.optimized.head.id[0]) == place:
                inner = zip(pair.source.regions, pair.optimized.regions, strict=False)
                found += [p for p in inner if p in matching.sides and p not in found]
    return found
