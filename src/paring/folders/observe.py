"""What the weights of a SavedModel meet: the float model is run on samples, and the inputs of its layers are summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as new
from itertools import islice
from typing import Any

import numpy as np

from paring.compress.base import Context, Moments
from paring.compress.gram import Gram, GramSum
from paring.compress.quantize import Quantize
from paring.compress.unfold import Unfolding
from paring.decision import Plan
from paring.errors import InputError
from paring.folders.planning import quantized, readers_of
from paring.folders.signatures import for_wire
from paring.formats.saved_model.apply import Place, SourceId
from paring.formats.saved_model.meets import Meeting, meeting
from paring.formats.saved_model.model import SavedModel
from paring.formats.saved_model.scope import FLOAT32, result_type
from paring.formats.saved_model.view import View
from paring.graph import OpId
from paring.measure.subject import start_framework
from paring.measure.watch import BUDGET
from paring.replay import ROWS, SAMPLES
from paring.runtime import RunError, Worker
from paring.samples import Sample

SUMS = 512e6  # bytes of second moments that are held at a time


@dataclass(frozen=True)
class Inputs:
    """What one weight meets.

    Attributes:
      meeting: How the weight lies as a matrix.
      mean: Of the inputs of each group, float64 [groups, inputs].
      second: Of their squares.
      means: The mean by reader, where it reads no other weight at the same place, and how it meets the weight.
      gram: Second moments of pairs of inputs, where they were asked for.
    """

    meeting: Meeting
    mean: np.ndarray = new(repr=False)
    second: np.ndarray = new(repr=False)
    means: Mapping[Place, tuple[Meeting, np.ndarray]] = new(repr=False)
    gram: Gram | None = new(default=None, repr=False)

    def context(self, name: str, settings: Quantize, width: int | None = None) -> Context:
        """For encoding the weight as a matrix [outputs, inputs]; with a `width`, inputs up to it that are always zero."""
        gram = self.gram.centered() if self.gram is not None and settings.bias_correction else self.gram
        mean, second, more = self.mean, self.second, (width or self.meeting.shape[1]) - self.meeting.shape[1]
        if more:
            mean, second = (np.pad(values, ((0, 0), (0, more))) for values in (mean, second))
            gram = _wider(gram, more) if gram is not None and gram.unfolding.parts == 1 else None
        return Context(name, 0, (1,), moments=Moments(mean.reshape(-1), second.reshape(-1)), gram=gram)

    def shifts(self, weight: np.ndarray, decoded: np.ndarray) -> dict[Place, np.ndarray]:
        """What each reader's mean result loses by going from the weight to another -> float32 in the weight's rank.

        Nagel, van Baalen, Blankevoort, Welling: Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV
        2019, section 4.2.
        """
        lost, found = weight.astype(np.float64) - decoded, {}
        for place, (how, mean) in self.means.items():
            rows = how.matrix(lost).reshape(how.groups, -1, mean.shape[1])
            found[place] = how.outwards(np.einsum("grk,gk->gr", rows, mean).reshape(-1).astype(np.float32))
        return found


def _wider(gram: Gram, more: int) -> Gram:
    groups, ((rows, width), pad) = gram.unfolding.groups, (gram.unfolding.shape, (0, more))
    second, cross = (np.pad(values, ((0, 0), pad, pad)) for values in (gram.second, gram.cross))
    mean, mean_float = (np.pad(values, ((0, 0), pad)) for values in (gram.mean, gram.mean_float))
    return Gram(Unfolding("dense", (rows, width + more), groups), second, cross, mean, mean_float, gram.rows)


@dataclass
class _Sums:
    """Sums of rows and of their squares."""

    mean: Any = 0.0
    second: Any = 0.0
    rows: int = 0
    turns: int = 0

    def add(self, rows: np.ndarray) -> None:
        self.mean = self.mean + rows.sum(axis=1, dtype=np.float64)
        self.second = self.second + np.square(rows, dtype=np.float64).sum(axis=1)
        self.rows += rows.shape[1]


@dataclass
class _Asked:
    """One weight: who reads it, how (`alike`: as the first), who alone; and what was seen so far."""

    name: str
    places: dict[Place, Meeting]
    alike: frozenset[Place]
    lone: frozenset[Place]
    whole: bool
    sums: dict[Place, _Sums] = new(default_factory=dict)
    gram: GramSum | None = None
    held: float = 0.0

    def take(self, number: int, place: Place, value: np.ndarray, limit: int) -> None:
        """One execution of a reader."""
        sums = self.sums.setdefault(place, _Sums())
        if not sums.turns:
            self.places[place] = self.places[place].meeting(value.shape)
        how = self.places[place]
        rows = how.rows(value, limit, np.random.default_rng([number, sums.turns]))
        sums.turns += 1
        if not rows.shape[1]:
            return
        sums.add(rows)
        if self.whole and place in self.alike:
            self.gram = self.gram or GramSum(how.matrices, 1, 0)
            parts = self.gram.unfolding.parts
            rows = rows if parts == 1 else rows.reshape(rows.shape[1], parts, -1).transpose(1, 0, 2)
            self.gram.add(rows, rows)

    def finish(self) -> Inputs | None:
        """What was seen; None where nothing was.

        Raises:
          InputError: Infinity or not-a-number.
        """
        seen = {place: sums for place, sums in self.sums.items() if sums.rows}
        alike = {place: sums for place, sums in seen.items() if place in self.alike}
        gram = self.gram.finish() if self.gram is not None else None
        self.sums, self.gram = {}, None
        if not alike:
            return None
        rows = sum(sums.rows for sums in alike.values())
        mean, second = (sum(getattr(sums, part) for sums in alike.values()) / rows for part in ("mean", "second"))
        if not np.isfinite(second).all():
            raise InputError(
                "cannot calibrate", where=f"layer {next(iter(seen))[1]}:{self.name}", expected="finite inputs",
                got="infinity or not-a-number", todo="Check the data's range, or skip the layer (--skip)",
            )  # fmt: skip
        means = {
            place: (self.places[place], sums.mean / sums.rows) for place, sums in seen.items() if place in self.lone
        }
        return Inputs(self.places[next(iter(alike))], mean, second, means, gram)


class Observation:
    """Watches a float model; use it as a context manager, and ask for the weights in the order in which they are given."""

    def __init__(
        self, model: SavedModel, asked: Mapping[SourceId, _Asked], samples: Mapping[str, Iterable[Sample]]
    ) -> None:
        """Nothing is run yet; `count` becomes the number of samples that were."""
        self.model, self.asked, self.samples = model, asked, dict(samples)
        self.places = [(place, it) for it in asked.values() for place in it.places]
        self.count = self._expected = 0
        self._found: dict[SourceId, Inputs | None] = {}
        self._worker: Worker | None = None

    def __enter__(self) -> Observation:
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker is not None:
            self._worker.close()

    @classmethod
    def of(
        cls, model: SavedModel, seen: View, made: Plan, twins: Mapping[SourceId, SourceId],
        samples: Callable[[], Mapping[str, Iterable[Sample]]] | None,
    ) -> tuple[Observation, dict[OpId, str]]:  # fmt: skip
        """What the plan needs to be observed; and for operators that are not, why.

        Args:
          model: The float model.
          seen: Its operators.
          made: What becomes of them.
          twins: Variables that hold the same as another.
          samples: Gives those of each signature, where there are any; asked only if they are needed.

        Raises:
          InputError: Weights are to be rounded by data, and there is none; or data that does not fit.
        """
        asked: dict[SourceId, _Asked] = {}
        left: dict[OpId, str] = {}
        modes = made.by_op()
        for id_, (source, readers) in readers_of(seen, twins).items():
            settings = modes[readers[0]].settings
            if source.refused or settings is None or not all(quantized(modes[op]) for op in readers):
                continue
            if settings.sequential and samples is None:
                raise InputError(
                    f"rounding {settings.rounding} needs data",
                    todo="Give samples with --data, or take --rounding nearest",
                )
            wanted = settings.weights in ("int8", "int4") and (
                settings.sequential or settings.bias_correction or settings.range == "mse"
            )
            if samples is None or not wanted:
                continue
            places, alike, lone, unknown = _places(model, seen, twins, id_, readers)
            if settings.bias_correction:
                left |= {
                    op: f"no bias correction: {why}" for op, why in unknown.items() if "multiplies nothing" not in why
                }
            if settings.sequential and not places:
                left |= {
                    op: f"{settings.rounding} does not know how: {why}, so it is rounded to nearest"
                    for op, why in unknown.items()
                }
            if places:
                asked[id_] = _Asked(source.name, places, alike, lone, settings.sequential)
        given = samples() if asked and samples is not None else {}
        if asked and not given:
            raise InputError(
                "cannot observe the model", where=str(model.path), expected="a signature to run", got="none",
                todo="Take rounding nearest, range minmax and no bias correction",
            )  # fmt: skip
        return cls(model, asked, given), left

    def inputs(self, id_: SourceId) -> Inputs | None:
        """What a weight meets; None where it is not observed, or no sample reaches it. Given once.

        Raises:
          InputError: The float model does not run on the data, or computes infinity or not-a-number.
        """
        if id_ in self.asked and id_ not in self._found:
            order = [*self.asked]
            self._observe(order[order.index(id_) :])
        return self._found.pop(id_, None)

    # -- running -----------------------------------------------------------------------------------------------------

    def _observe(self, order: Sequence[SourceId]) -> None:
        """Runs the samples for as many of these weights as fit into memory, the first at least."""
        worker = self._started()
        part: list[SourceId] = []
        values = sums = 0.0
        for id_ in order:
            it = self.asked[id_]
            shape = next(iter(it.places.values())).matrices
            mine = 16.0 * shape.groups * shape.shape[1] ** 2 / shape.parts if it.whole else 0.0
            if part and (values + it.held > BUDGET or sums + mine > SUMS):
                break
            part.append(id_)
            values, sums = values + it.held, sums + mine
        mine_now = [self.asked[id_] for id_ in part]
        wanted = [number for number, (_, it) in enumerate(self.places) if any(it is one for one in mine_now)]
        limit, count = max(1, ROWS // max(1, self._expected)), 0
        for key, given in self.samples.items():
            for sample in islice(given, SAMPLES):
                count += 1
                seen = worker.sense("source", key, for_wire(sample), wanted, inputs=True).results
                for number, executions in seen.items():
                    place, it = self.places[number]
                    for value in executions:
                        it.take(number, place, value, limit)
        self.count = max(self.count, count)
        self._found |= {id_: self.asked[id_].finish() for id_ in part}

    def _started(self) -> Worker:
        """The child with the model, how many samples there are, and how many bytes each layer reads."""
        if self._worker is not None:
            return self._worker
        self._worker = worker = start_framework(self.model.path, 0)
        points = [(scope, node, (it.places[scope, node, index].input,)) for (scope, node, index), it in self.places]
        worker.probe("source", self.model.path, points, "")
        signatures, known = self.model.signatures(), dict[tuple[Any, ...], set[int]]()
        for key, given in [*self.samples.items()]:
            size = len(given) if isinstance(given, list) else getattr(given, "count", None)
            first = next(iter(given), None)
            if first is None:
                raise InputError("cannot observe the model", expected="at least one sample", got="an empty data set")
            try:
                sizes = worker.sense("source", key, for_wire(first), ()).sizes
            except RunError as why:
                raise InputError(
                    "the float model does not run on the data", where=f"signature {key}", got=str(why)
                ) from why
            run = {number for number, read in enumerate(sizes) if read}
            if run <= known.setdefault(tuple(signatures[key][0]), set()):  # Keras exports one function under two names
                del self.samples[key]
                continue
            known[tuple(signatures[key][0])] |= run
            self._expected += min(size or SAMPLES, SAMPLES)
            for (_, it), read in zip(self.places, sizes, strict=True):
                it.held += 2.0 * read
        return worker


def _places(
    model: SavedModel, seen: View, twins: Mapping[SourceId, SourceId], id_: SourceId, readers: Sequence[OpId]
) -> tuple[dict[Place, Meeting], frozenset[Place], frozenset[Place], dict[OpId, str]]:
    """Who reads a weight as a matrix; who of them as the first does; who reads no other there; why others are not observed."""
    places: dict[Place, Meeting] = {}
    alike: set[Place] = set()
    lone: set[Place] = set()
    left: dict[OpId, str] = {}
    for op in readers:
        for source, use in zip(seen.sources[op], seen.uses[op], strict=True):
            if twins.get(source.id, source.id) != id_:
                continue
            found = meeting(model.flow.scopes[use.scope], source, use)
            if isinstance(found, str):
                left[op] = found
                continue
            place = (use.scope, use.node, use.input)
            places[place] = found
            first = next(iter(places.values()))
            if (first.order, first.outputs, first.groups) == (found.order, found.outputs, found.groups):
                alike.add(place)
            pairs = zip(seen.sources[op], seen.uses[op], strict=True)
            if result_type(model.flow.scopes[use.scope].by_name[use.node], 0) != FLOAT32:
                left[op] = "its result is no float32"
            elif len({twins.get(s.id, s.id) for s, u in pairs if u.input == use.input}) == 1:
                lone.add(place)
            else:
                left[op] = "its function is called with several weights"
    return places, frozenset(alike), frozenset(lone), left


__all__ = ["Inputs", "Observation"]
