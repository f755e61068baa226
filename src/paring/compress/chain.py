"""Several algorithms on one weight, one behind the other, as one algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from paring.compress.base import Algorithm, Context, Encoded, Extra
from paring.errors import InputError

SIDES = ("left", "right")  # factors of a stage that decomposes


def chain(*algorithms: Algorithm) -> Chain:
    """One algorithm that applies several in order; chains inside are taken apart.

    Raises:
      InputError: There is none, or one is no algorithm.

    >>> from paring.compress import Cluster, Quantize, Sparsify
    >>> both = chain(Sparsify(0.5), Cluster(4), Quantize("int8", "float"))
    >>> w = np.arange(1, 17, dtype=np.float32).reshape(2, 8)
    >>> both.decode(both.encode(w, Context("layer", axis=0))).round(2).tolist()[0]
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    """
    stages: list[Algorithm] = []
    for one in algorithms:
        if not isinstance(one, Algorithm):
            raise InputError("cannot chain", expected="algorithms", got=repr(one))
        stages += one.stages if isinstance(one, Chain) else [one]
    if not stages:
        raise InputError("cannot chain", expected="at least one algorithm", got="none")
    return Chain(tuple(stages))


@dataclass(frozen=True)
class Chain(Algorithm):
    """See `chain`. Each stage works on what the one before it leaves; behind one that decomposes, on each of the factors.

    Attributes:
      stages: The algorithms. Their variables carry the stage's number: `0.mask`, `1.centroids`, `2.left.scale`.
    """

    stages: tuple[Algorithm, ...] = ()

    @property
    def makes(self) -> frozenset[str]:  # type: ignore[override]
        """What a stage promises and no later one gives up."""
        return reduce(lambda held, stage: (held - stage.gives_up) | stage.makes, self.stages, frozenset[str]())

    @property
    def gives_up(self) -> frozenset[str]:
        """What any stage gives up."""
        return frozenset().union(*(stage.gives_up for stage in self.stages))

    @property
    def trains_weight(self) -> bool:  # type: ignore[override]
        """Whether all of them do."""
        return all(stage.trains_weight for stage in self.stages)

    def settings(self) -> dict[str, Any]:
        """The settings of each stage by its class's name."""
        return {"stages": [{type(stage).__name__: stage.settings()} for stage in self.stages]}

    # -- once --------------------------------------------------------------------------------------------------------

    def encode(self, weight: np.ndarray, context: Context) -> Encoded:
        """What the last stage makes of what the others leave; behind a decomposition, the factors as they are stored."""
        found = Encoded(weight, "float32", None)
        for number, (stage, told) in enumerate(zip(self.stages, self._contexts(context), strict=True)):
            found = stage.encode(weight, told)
            if found.factors is not None and number + 1 < len(self.stages):
                rest, plain = Chain(self.stages[number + 1 :]), _plain(told)
                left, right = (rest.decode(rest.encode(factor, plain)) for factor in found.factors)
                values = np.asarray((left @ right).reshape(weight.shape), np.float32)
                return Encoded(values, "float32", None, factors=(left, right))
            weight = stage.decode(found)
        return found

    def decode(self, encoded: Encoded) -> np.ndarray:
        """The float32 values."""
        if encoded.factors is not None or encoded.form == "float32":
            return encoded.values
        return self.stages[-1].decode(encoded)

    # -- training ----------------------------------------------------------------------------------------------------

    def variables(self, weight: np.ndarray, context: Context) -> dict[str, Extra]:
        """Those of all stages, each from the weight as the stages before it leave it at the first step."""
        found: dict[str, Extra] = {}
        for number, (stage, told) in enumerate(zip(self.stages, self._contexts(context), strict=True)):
            found |= {f"{number}.{name}": extra for name, extra in stage.variables(weight, told).items()}
            rest = self.stages[number + 1 :]
            if rest and _decomposes(stage):
                for side, factor in zip(SIDES, stage.encode(weight, told).factors or (), strict=True):
                    found |= _ahead(Chain(rest).variables(factor, _plain(told)), number, side)
                return found
            weight = stage.begin(weight, told) if rest else weight
        return found

    @property
    def by_data(self) -> bool:
        """Whether any of them is."""
        return any(stage.by_data for stage in self.stages)

    def prepare(self, weight: np.ndarray, context: Context) -> np.ndarray:
        """What the stages make of the raw weight, up to one that decomposes."""
        for stage, told in zip(self.stages, self._contexts(context), strict=True):
            weight = stage.prepare(weight, told)
            if _decomposes(stage):
                break
        return weight

    def begin(self, weight: np.ndarray, context: Context) -> np.ndarray:
        """What the last stage begins with, applied."""
        for number, (stage, told) in enumerate(zip(self.stages, self._contexts(context), strict=True)):
            rest = self.stages[number + 1 :]
            if rest and _decomposes(stage):
                factors = stage.encode(weight, told).factors or ()
                left, right = (Chain(rest).begin(factor, _plain(told)) for factor in factors)
                return np.asarray(left @ right)
            weight = stage.begin(weight, told)
        return weight

    def update(
        self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context
    ) -> dict[str, Any]:
        """New values of all stages, each from what the updated ones before it leave."""
        found: dict[str, Any] = {}
        last = max((number for number, stage in enumerate(self.stages) if _updates(stage)), default=-1)
        for number, (stage, told) in enumerate(zip(self.stages[: last + 1], self._contexts(context), strict=False)):
            own = _own(variables, f"{number}.")
            new = stage.update(ops, weight, own, step, told)
            found |= {f"{number}.{name}": value for name, value in new.items()}
            if number == last:
                break
            if (factors := stage.factors(ops, weight, own | new, step, told)) is not None:
                rest, plain = Chain(self.stages[number + 1 :]), _plain(told)
                for side, factor in zip(SIDES, factors, strict=True):
                    moved = rest.update(ops, factor, _behind(variables, number, side), step, plain)
                    found |= _ahead(moved, number, side)
                break
            weight = stage.project(ops, weight, own | new, step, told)
        return found

    def project(self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context) -> Any:
        """What the last stage makes of what the others leave."""
        found = self._walk(ops, weight, variables, step, context)
        return ops.matmul(*found) if isinstance(found, tuple) else found

    def factors(
        self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context
    ) -> tuple[Any, Any] | None:
        """The factors as later stages leave them; None where no stage decomposes."""
        if not any(_decomposes(stage) for stage in self.stages):
            return None
        found = self._walk(ops, weight, variables, step, context)
        return found if isinstance(found, tuple) else None

    def hold(self, ops: Any, weight: Any, variables: Mapping[str, Any], context: Context) -> Any:
        """What the stages' holds make of the raw weight, up to one that decomposes; None where none holds anything."""
        held = None
        for number, (stage, own) in enumerate(zip(self.stages, self._contexts(context), strict=True)):
            new = stage.hold(ops, weight, _own(variables, f"{number}."), own)
            if new is not None:
                weight = held = new
            if _decomposes(stage):
                break
        return held

    def resolved(self, steps_per_epoch: int | None, epochs: float | None) -> Chain:
        """With all schedules in steps."""
        return Chain(tuple(stage.resolved(steps_per_epoch, epochs) for stage in self.stages))

    def allocate(self, weights: Sequence[np.ndarray], contexts: Sequence[Context]) -> Sequence[Algorithm]:
        """One chain per weight: every stage shares its own budget out over the raw weights."""
        shared = [stage.allocate(weights, contexts) for stage in self.stages]
        return [Chain(tuple(own)) for own in zip(*shared, strict=True)]

    def promises(self, weight: np.ndarray, context: Context) -> tuple[str, ...]:
        """What each stage promised and the finished weight does not hold, also where a later stage gives it up by design.

        Stages behind a decomposition promise something of its factors, not of this product, and are not asked.
        """
        unmet = zip(self.stages, self.unmet(weight, None, context), strict=True)
        return tuple(f"{type(stage).__name__}: {text}" for stage, texts in unmet for text in texts)

    def unmet(
        self, weight: np.ndarray, factors: tuple[np.ndarray, np.ndarray] | None, context: Context
    ) -> list[tuple[str, ...]]:
        """What each stage promised and the finished weight, or its factors, do not hold.

        Args:
          weight: float32 [outputs, taps * inputs].
          factors: Those that are stored in its place, which is what stages behind a decomposition speak of; None: they are not
            asked.
          context: Of the weight.
        """
        found: list[tuple[str, ...]] = []
        parts: tuple[np.ndarray, ...] | None = None
        for stage, told in zip(self.stages, self._contexts(context), strict=True):
            if parts is None:
                found.append(stage.promises(weight, told))
            else:
                found.append(tuple(text for part in parts for text in stage.promises(part, _plain(told))))
            if parts is None and _decomposes(stage):
                parts = factors or ()
        return found

    def _walk(self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context) -> Any:
        """The projected weight, or its factors as they are stored."""
        for number, (stage, told) in enumerate(zip(self.stages, self._contexts(context), strict=True)):
            own = _own(variables, f"{number}.")
            if (factors := stage.factors(ops, weight, own, step, told)) is None:
                weight = stage.project(ops, weight, own, step, told)
                continue
            rest = self.stages[number + 1 :]
            if not rest:
                return factors
            plain = _plain(told)
            return tuple(
                Chain(rest).project(ops, factor, _behind(variables, number, side), step, plain)
                for side, factor in zip(SIDES, factors, strict=True)
            )
        return weight

    def _contexts(self, context: Context) -> list[Context]:
        """What each stage is told: zeros that an earlier one made are there on purpose."""
        found = []
        for stage in self.stages:
            found.append(context)
            pruned = "zeros" in stage.makes or (context.pruned and "zeros" not in stage.gives_up)
            context = replace(context, pruned=pruned)
        return found


def _updates(stage: Algorithm) -> bool:
    return type(stage).update is not Algorithm.update


def _decomposes(stage: Algorithm) -> bool:
    return type(stage).factors is not Algorithm.factors


def _plain(context: Context) -> Context:
    """What is known of a factor."""
    return Context(context.name, axis=0)


def _own(variables: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in variables.items() if name.startswith(prefix)}


def _ahead(variables: Mapping[str, Any], number: int, side: str) -> dict[str, Any]:
    """Names that stages behind stage `number` use among themselves, for one of its factors -> the chain's names."""
    found = {}
    for name, value in variables.items():
        behind, _, last = name.partition(".")
        found[f"{number + 1 + int(behind)}.{side}.{last}"] = value
    return found


def _behind(variables: Mapping[str, Any], number: int, side: str) -> dict[str, Any]:
    """The inverse of `_ahead`."""
    found = {}
    for name, value in variables.items():
        stage, _, last = name.partition(".")
        if int(stage) > number and last.startswith(f"{side}."):
            found[f"{int(stage) - number - 1}.{last.removeprefix(f'{side}.')}"] = value
    return found
