"""The search from top to bottom: prepare, measure each layer alone, climb the ladder, try single steps back, write."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paring.compress.quantize import Quantize
from paring.errors import BoundError, InputError
from paring.folders.optimize import check_target as check_folder
from paring.formats import SUFFIXES, load
from paring.formats.saved_model.model import is_saved_model
from paring.measure.result import Candidate, Sensitivity, Tuning
from paring.optimize import Result, check_target
from paring.recipe import Recipe
from paring.tuning import trial as trials
from paring.tuning.journal import Journal
from paring.tuning.limits import Limits
from paring.tuning.pool import Pool
from paring.tuning.prepare import JOURNAL, Run, claim, clean
from paring.tuning.schemes import BASE, folder_schemes, label_of, only, recipe_of, schemes
from paring.tuning.search import Allocation, Option, first_right, ladder, pareto, smaller
from paring.tuning.store import stored
from paring.tuning.subject import FolderSubject, Subject, TfliteSubject, bytes_of
from paring.tuning.trial import Outcome

ALIKE = 4.0  # candidates whose noise differs by less than this factor tell of each other's drop
BELOW = 12  # candidates below the first one that kept the bound
STEPS_BACK = 8  # single layers made smaller again, at most
ROUNDS, TOGETHER = 15, 6  # of latency, and how many candidates are timed side by side


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
      tuning: All that was measured, as plain data.
      recipe: The recipe of the chosen candidate.
      result: The model that was written, with its report.
    """

    tuning: Tuning
    recipe: Recipe
    result: Result


def tune(
    source: Any,
    data: Any,
    *,
    output: str | os.PathLike[str],
    metric: str | None = None,
    max_drop: str | float | None = None,
    max_size: str | float | None = None,
    max_latency: str | float | None = None,
    labels: Any = None,
    activations: str = "dynamic",
    rounding: str = "adaround",
    skip: Sequence[str] = (),
    executor: Executor | None = None,
    width: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    image_range: Any = None,
    runtime: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Tuned:
    """Finds the smallest model within `max_drop` (or the best within the other bounds), and writes it.

    First each layer alone is put under each scheme (float16, int8, int8-int16, int4, int4 in blocks) and the output's error is
    measured. These errors order the mixed models from the smallest to the most exact; the search measures as many of
    them as it needs, on samples that calibration did not see, then tries single layers smaller again. What is measured
    is kept in a folder, so that an interrupted search goes on from there.

    Args:
      source: A model as `paring.load` takes it, with one signature (a SavedModel that becomes another: with equal inputs).
      data: Samples, with labels for metrics that need them. Every fourth, up to 256, is calibrated on.
      output: The .tflite file to write; a SavedModel becomes another one under any other name.
      metric: See `paring.measure.metrics.find_metric`; top1 where there are class labels, else mse against the float model.
      max_drop: `0.5pt`, `0.5%` (relative), or a number for a metric without unit. It is kept with a standard error to spare
        where that can be had.
      max_size: `60kB`, `1.5MB` or bytes.
      max_latency: `3ms`, `800us`: the median with one thread, on this machine.
      labels: `.npy` file or array.
      activations: Of int8 and int4 layers: `dynamic`, or `int8` for models that are integer throughout; in SavedModels
        `dynamic` leaves them float, `bfloat16` rounds them.
      rounding: Of int4 weights: `adaround`, `gptq` (quicker on wide layers) or `nearest`.
      skip: Patterns of operators that stay float.
      executor: Runs the trials; a process here for each where None. Its workers must see `folder`.
      width: Trials under way at a time.
      folder: Where measurements are kept: a new folder, or that of an interrupted search; `OUTPUT.tune` where None. It is
        removed when the search is done.
      overwrite: Whether `output` may exist.
      limit: At most so many samples.
      image_range: See `paring.optimize`.
      runtime: Of a SavedModel: see `paring.optimize`; on the native one int4 in blocks is tried, too.
      progress: Called with what is done, how many trials, of how many.

    Raises:
      InputError: Bad model, data, metric or bound.
      BoundError: No candidate keeps the bounds; the message names the nearest.
    """
    started = time.perf_counter()
    as_folder = is_saved_model(source) and Path(output).suffix not in SUFFIXES
    kinds = ("dynamic", "bfloat16") if as_folder else ("dynamic", "int8")
    if activations not in kinds:
        raise InputError("bad activations", expected=" or ".join(kinds), got=str(activations))
    if runtime is not None and not as_folder:
        raise InputError(
            "there is no choice of runtimes", where=f"--runtime {runtime}", expected="a SavedModel, written to a folder"
        )
    if as_folder:
        check_folder(Path(source), Path(output), overwrite)
    else:
        check_target(output, overwrite)
    if max_drop is None and max_size is None and max_latency is None:
        raise InputError("there is nothing to tune for", todo="Say --max-drop, --max-size or --max-latency")
    work = Path(folder) if folder is not None else Path(f"{output}.tune")
    subject: Subject
    if as_folder:
        subject = FolderSubject(Path(source), str(source), runtime or "portable")
        offered = folder_schemes(activations, rounding, subject.runtime)
    else:
        subject, offered = TfliteSubject(load(source)), schemes(activations, rounding)
    claim(work)
    try:
        run = Run.prepare(subject, data, work, metric, labels, limit, image_range, offered, skip)
        bounds = Limits.parse(max_drop, max_size, max_latency, run.metric, run.before.score)
    except BaseException:
        if not (work / JOURNAL).exists():  # nothing was measured that another try could go on from
            clean(work)
        raise
    journal = Journal(work / JOURNAL)
    with Pool(journal, executor, width=width, progress=run.step) as pool:
        run.pool, run.report = pool, progress
        search = _Search(run, offered, tuple(skip), bounds)
        chosen = search.find()
    recipe = search.recipe(chosen)
    result = subject.make(work, recipe, Path(output), final=True, overwrite=overwrite)
    tuning = search.told(chosen, time.perf_counter() - started)
    clean(work)
    return Tuned(tuning, recipe, result)


class _Search:
    """Candidates are measured at most once; `outcomes` holds them in the order in which they were asked for."""

    def __init__(self, run: Run, offered: Mapping[str, Quantize], skip: tuple[str, ...], bounds: Limits) -> None:
        self.run, self.offered, self.skip, self.bounds = run, offered, skip, bounds
        self.names = run.subject.names()
        self.source = run.subject.plain_bytes(run.folder)
        self.outcomes: dict[Allocation, Outcome] = {}
        self.latencies: dict[Allocation, float] = {}
        self.float_ms: float | None = None
        self.swept: list[Sensitivity] = []
        self.options: dict[str, list[Option]] = {}
        self.refused: Counter[str] = Counter()

    @property
    def width(self) -> int:
        """How many candidates are worth asking for at a time."""
        return max(2, self.run.pool.width if self.run.pool is not None else 1)

    def recipe(self, allocation: Allocation) -> Recipe:
        name = f"tuned {Path(self.run.subject.path).stem}"
        return recipe_of(allocation, self.offered, self.skip, name, self.names)

    def find(self) -> Allocation:
        """The candidate to write.

        Raises:
          BoundError: None keeps the bounds.
        """
        self.sweep()
        if self.bounds.latency is not None:
            self.leave_slow_ones()
        rungs = ladder(self.options)
        whole = [self.uniform(scheme) for scheme in self.offered]
        self.measure(list(dict.fromkeys([*whole, rungs[0], rungs[-1]])))
        if self.bounds.drop is not None:
            first = first_right(len(rungs), lambda places: self.right([rungs[p] for p in places]), self.width)
            # Errors only nearly add up, so a smaller one may keep the bound too: some of those below, and a neighbour.
            below = range(len(rungs) if first is None else first)
            places = {round(p) for p in np.linspace(0, max(0, len(below) - 1), min(BELOW, len(below)))}
            self.measure([rungs[p] for p in sorted(places)] + ([] if first is None else rungs[first : first + 2]))
        else:  # the best that fits: the most exact ones first
            fitting = [r for r in rungs if self.bounds.size is None or self.bytes(r) <= self.bounds.size]
            self.measure(fitting[-4:])
        self.time()
        best = self.best()
        if self.bounds.drop is not None and best is not None:
            best = self.back(best)
        self.time()
        if best is None:
            raise self.nothing()
        return best

    # -- the sweep -------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Every layer alone under each of its schemes."""
        pairs = [(layer, scheme) for layer, found in self.run.layers.items() for scheme in found]
        # To order layers, GPTQ says as much as AdaRound, and is quicker.
        quick = {n: replace(q, rounding="gptq") if q.sequential else q for n, q in self.offered.items()}
        recipes = [only(layer, quick[scheme], self.names).restricted(self.skip) for layer, scheme in pairs]
        natives = {op.name: op.native for op in self.run.subject.graph.ops}
        for (layer, scheme), found in zip(pairs, self.run.try_all("sensitivity", recipes, scored=False), strict=True):
            if found.failed:
                self.refused[found.failed] += 1
                continue
            own = found.bytes - self.source
            self.options.setdefault(layer, []).append(Option(scheme, float(own), found.noise))
            decibel = -10 * float(np.log10(found.noise))
            self.swept.append(Sensitivity(layer, natives.get(layer, ""), scheme, decibel, own))
        if not self.options:
            got = f"no scheme works on any layer ({next(iter(self.refused))})"
            raise InputError("there is nothing to tune", where=self.run.subject.path, got=got)

    def leave_slow_ones(self) -> None:
        """Takes away schemes that, on all layers of one kind and int8 on the others, miss the bound on latency."""
        assert self.bounds.latency is not None
        natives = {op.name: op.native for op in self.run.subject.graph.ops}
        probes = {}
        for layer, options in self.options.items():
            for option in options:
                mine = {a: option.scheme for a in self.options if natives[a] == natives[layer]}
                probes[natives[layer], option.scheme] = tuple(
                    (a, mine[a] if a in mine and mine[a] in self.schemes(a) else scheme)
                    for a, scheme in self.uniform(BASE)
                )
        self.measure(list(probes.values()))
        self.time()
        for layer, options in self.options.items():
            quick = [
                o for o in options
                if self.latencies.get(probes[natives[layer], o.scheme], np.inf) <= self.bounds.latency
            ]  # fmt: skip
            self.options[layer] = quick or options

    def schemes(self, layer: str) -> list[str]:
        """The schemes that work on a layer."""
        return [option.scheme for option in self.options[layer]]

    def uniform(self, scheme: str) -> Allocation:
        """All layers under one scheme, or under int8 (the first they have) where they do not take it."""
        found = []
        for layer in self.options:
            names = self.schemes(layer)
            found.append((layer, scheme if scheme in names else BASE if BASE in names else names[0]))
        return tuple(found)

    def bytes(self, allocation: Allocation) -> float:
        """What the file will take, from what each layer alone saved."""
        own = {(layer, o.scheme): o.cost for layer, options in self.options.items() for o in options}
        return self.source + sum(own[pair] for pair in allocation)

    # -- candidates ------------------------------------------------------------------------------------------------

    def measure(self, allocations: Sequence[Allocation]) -> None:
        new = [a for a in dict.fromkeys(allocations) if a not in self.outcomes]
        found = self.run.try_all("candidates", [self.recipe(a) for a in new], scored=True)
        self.outcomes.update(zip(new, found, strict=True))

    def right(self, allocations: Sequence[Allocation]) -> list[bool]:
        """Which keep the bounds on the drop."""
        self.measure(allocations)
        drop = Limits(drop=self.bounds.drop)
        return [drop.misses(self.outcomes[a], None, self.cautious(self.outcomes[a])) == 0 for a in allocations]

    def cautious(self, outcome: Outcome) -> float | None:
        """The drop to reckon with on other data: one standard error above the measured one, or above what candidates
        with about as noisy an output lose for their noise, if that is more. The lucky one among many must not win."""
        if outcome.failed or outcome.drop is None:
            return None
        like = [
            o for o in self.outcomes.values()
            if o.drop is not None and not o.failed and 1 / ALIKE <= o.noise / outcome.noise <= ALIKE
        ]  # fmt: skip
        noise = sum(o.noise for o in like)
        expected = outcome.noise * sum(o.drop or 0.0 for o in like) / noise if noise else outcome.drop
        return max(outcome.drop, expected) + (outcome.spread or 0.0)

    def best(self) -> Allocation | None:
        """The smallest that keeps all bounds (the best in score where the drop is not bound), None where none does."""
        for careful in (True, False):
            right = [
                a for a, o in self.outcomes.items()
                if not self.bounds.misses(o, self.latencies.get(a), self.cautious(o) if careful else None)
            ]  # fmt: skip
            if right and self.bounds.drop is not None:
                return min(right, key=lambda a: self.outcomes[a].bytes)
            if right:
                return min(right, key=lambda a: (self.outcomes[a].drop or 0.0, self.outcomes[a].bytes))
        return None

    def back(self, best: Allocation) -> Allocation:
        """Single layers a scheme smaller, as long as that keeps the bounds; the ladder's errors only nearly add up."""
        tried = 0
        while tried < STEPS_BACK:
            steps = [a for a in smaller(best, self.options) if a not in self.outcomes][: self.width]
            if not steps:
                break
            tried += len(steps)
            self.measure(steps)
            self.time()
            found = self.best()
            if found is None or found == best:
                continue
            best = found
        return best

    def time(self) -> None:
        """Latency of what was not timed so far, beside the float model; the trials are at rest then."""
        new = [a for a, o in self.outcomes.items() if a not in self.latencies and not o.failed]
        if not new:
            return
        subject, folder = self.run.subject, self.run.folder
        (sample,) = subject.feed(stored(folder / trials.MEASURING, 1)).head(1)
        for start in range(0, len(new), TOGETHER):
            group = {f"candidate {n}": a for n, a in enumerate(new[start : start + TOGETHER])}
            files = {n: self.run.trial(self.recipe(a), scored=True).file(subject.suffix) for n, a in group.items()}
            taken = subject.time({"float": folder / subject.kept, **files}, sample, ROUNDS)
            if self.float_ms is None:
                self.float_ms = taken["float"].median_ms
            # Each time by its ratio to the float model beside it: the machine may be slower now than it was before.
            self.latencies.update({a: self.float_ms * taken[name].ratio for name, a in group.items()})

    def nothing(self) -> BoundError:
        """What to say where no candidate keeps the bounds."""
        known = {a: o for a, o in self.outcomes.items() if not o.failed}
        if not known:
            why = next(iter(self.outcomes.values())).failed
            return BoundError("no candidate could be made", where=self.run.subject.path, got=why)
        near = min(known, key=lambda a: self.bounds.misses(known[a], self.latencies.get(a)))
        found, unit = known[near], f" {self.run.metric.unit}" if self.run.metric.unit else ""
        static = self.offered[BASE].static
        quicker = (
            "" if static or self.bounds.latency is None else ", or take --activations int8, which is mostly quicker"
        )
        time_said = f", {self.latencies[near]:.3g} ms" if near in self.latencies else ""
        return BoundError(
            "no candidate keeps the bounds", where=self.run.subject.path,
            expected=", ".join(f"{name} {value:g}" for name, value in self.bounds.said().items()),
            got=f"nearest: {label_of(near)} with a drop of {found.drop:.3g}{unit}, {found.bytes:,} bytes{time_said}",
            todo=f"Loosen a bound{quicker}; measurements are kept, so the next try is quick",
        )  # fmt: skip

    def told(self, chosen: Allocation, seconds: float) -> Tuning:
        """All that was measured, as plain data."""
        known = {a: o for a, o in self.outcomes.items() if not o.failed}
        front = pareto([(float(o.bytes), o.drop or 0.0) for o in known.values()])
        candidates = tuple(
            Candidate(
                label_of(a), o.bytes, o.score or 0.0, o.drop or 0.0, self.recipe(a).to_data(), self.latencies.get(a),
                pareto=on_front, chosen=a == chosen, seconds=o.seconds,
            )
            for (a, o), on_front in zip(known.items(), front, strict=True)
        )  # fmt: skip
        size = bytes_of(self.run.folder / self.run.subject.kept)
        notes = list(self.run.notes)
        outcome = self.outcomes[chosen]
        if self.bounds.misses(outcome, self.latencies.get(chosen), self.cautious(outcome)):
            spare = "though models with as noisy an output lost more"
            if outcome.spread is not None:
                spare = f"with less than a standard error ({outcome.spread:.2g}) to spare"
            notes.append(
                f"the bound on the drop is kept on these samples, {spare}: more samples would tell whether it holds"
            )
        notes += [f"{count} layers cannot take a scheme: {why}" for why, count in self.refused.items()]
        failed = {o.failed for o in self.outcomes.values() if o.failed}
        notes += [f"some candidates could not be made: {why}" for why in sorted(failed)]
        before = Candidate("float", size, self.run.before.score, 0.0, {}, self.float_ms)
        reused = self.run.pool.reused if self.run.pool is not None else 0
        return Tuning(
            self.run.subject.path, self.run.metric.name, self.bounds.said(), before, candidates, tuple(self.swept),
            self.run.samples, seconds, reused, tuple(notes),
        )  # fmt: skip


__all__ = ["Tuned", "tune"]
