"""What each weight of a model gets: the stages of its rule, resolved for its shape, target and budget, as one algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import keras
import numpy as np

from paring.compress.base import Algorithm, Context
from paring.compress.chain import chain
from paring.compress.gram import Gram
from paring.compress.quantize import Quantize
from paring.compress.sparsify import Sparsify
from paring.errors import InputError
from paring.layer import Layer
from paring.recipe import Rule
from paring.targets import choose, find
from paring.training.layouts import Part, kind_of, name_of
from paring.training.sites import FLOAT, LINEAR, Site, Sites
from paring.training.state import State
from paring.training.trace import Trace
from paring.training.weights import Compressed, Target, flat_of, folding

_INTEGER = ("int8", "int4")
_FACTORED = ("Dense", "EinsumDense", "Conv1D", "Conv2D", "Conv3D")


@dataclass(eq=False)
class Place:
    """An operation of the model: where it is, and what its rule says.

    Attributes:
      op: The Keras layer or operation.
      path: Names of the models and layers around it, and its own.
      parts: Its weights.
      rule: The rule that it follows, None for float.
      reason: Which one that is, or why none.
      stages: What its weights get of the rule's stages.
      left: Why they do not get the others.
    """

    op: Any
    path: str
    parts: list[Part] = field(default_factory=list)
    rule: Rule | None = None
    reason: str = ""
    stages: list[Algorithm] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def quantize(self) -> Quantize | None:
        """Its last stage where it quantizes, with the activations that its kernel has."""
        stage = self.rule.apply if self.rule is not None else None
        return replace(stage, activations="float") if stage is not None and name_of(self.op) in FLOAT else stage


Given = tuple[Part, Algorithm, Context]


def algorithms(
    places: Iterable[Place],
    found: Trace,
    steps_per_epoch: int | None,
    epochs: float | None,
    look: Callable[[Sequence[Any]], Mapping[Any, Gram]],
    sites: Sites,
) -> tuple[dict[Any, list[Given]], list[tuple[Part, np.ndarray]]]:
    """For each layer its weights with their algorithms; budgets over all weights of a rule are shared out here.

    Args:
      places: Operations with their rules.
      found: The model's graph.
      steps_per_epoch: For schedules.
      epochs: Likewise.
      look: Gives the second moments of what some layers read.
      sites: Which batch normalization stands behind which layer.

    Returns:
      The algorithms by layer, and the weights with which training begins where these are others: float32
      [outputs, taps * inputs].
    """
    members: list[tuple[Place, Part, Context, np.ndarray, list[Algorithm]]] = []
    shapes = {node.op: node for node in found.nodes}
    for p in places:
        for part in p.parts if p.rule is not None else ():
            weight = np.asarray(part.layout.matrix(np, keras.ops.convert_to_numpy(part.variable)), np.float32)
            context = Context(p.path, 0, (1,), taps=part.layout.taps(part.shape))
            fitted = [_fitted(stage, p, weight, context, shapes.get(p.op)) for stage in p.rule.stages] if p.rule else []
            p.stages += [stage for stage in fitted if stage is not None and stage not in p.stages]
            own = [_trainable(stage).resolved(steps_per_epoch, epochs) for stage in fitted if stage is not None]
            members.append((p, part, context, weight, own))
    asking = list({p.op: None for p, *_, own in members if any(stage.by_data for stage in own)})
    moments = look(asking) if asking else {}
    for number, (p, part, context, weight, own) in enumerate(members):
        context = replace(context, gram=moments.get(p.op), gain=_gain(sites.folded.get(p.op)))
        members[number] = p, part, context, weight, own
    groups: dict[Any, list[tuple[int, int]]] = {}  # members that share a stage of a rule
    for number, (p, _, _, _, own) in enumerate(members):
        for place, stage in enumerate(own):
            groups.setdefault((p.rule, stage), []).append((number, place))
    for (_, stage), group in groups.items():
        shared = stage.allocate([members[n][3] for n, _ in group], [members[n][2] for n, _ in group])
        for (number, place), one in zip(group, shared, strict=True):
            members[number][4][place] = one
    given: dict[Any, list[Given]] = {}
    begun = []
    for p, part, context, weight, own in members:
        if own:
            algorithm = chain(*own)
            first = algorithm.prepare(weight, context)
            if first is not weight:
                begun.append((part, first))
                p.left.append("begins with zeros chosen by data")
            context = replace(context, gram=None)  # which is large
            given.setdefault(p.op, []).append((part, algorithm, context))
    return given, begun


def _gain(norm: Any) -> np.ndarray | None:
    return None if norm is None else np.asarray(keras.ops.convert_to_numpy(folding(norm)[0]), np.float32)


def _trainable(stage: Algorithm) -> Algorithm:
    if type(stage).project is Algorithm.project:
        raise InputError(
            "cannot train with this algorithm", where=type(stage).__name__, expected="a `project` method",
            todo="docs/your-own-algorithm.md shows one",
        )  # fmt: skip
    return stage


def _fitted(stage: Algorithm, p: Place, weight: np.ndarray, context: Context, node: Any) -> Algorithm | None:
    """A stage as this weight gets it: pruning in the pattern that its target gains from; None where it does not pay."""
    if not isinstance(stage, Sparsify):
        return stage
    if weight.size < stage.min_size:
        p.left.append(f"not pruned: {weight.size} weights, fewer than {stage.min_size} (min_size)")
        return None
    if not stage.target:
        return stage
    pattern, why = choose(find(stage.target), _layer(p, weight, context, node))
    if pattern is None:
        p.left.append(f"not pruned: {why}")
        return None
    p.left.append(f"zeros {stage.pattern or pattern}: {why}")
    return replace(stage, pattern=stage.pattern or pattern, target="")


def _layer(p: Place, weight: np.ndarray, context: Context, node: Any) -> Layer:
    dtype = p.quantize.multiplied if p.quantize is not None else "float32"
    positions = 1
    if node is not None and node.tensors:
        shape = p.op.compute_output_shape(node.tensors[0].shape)
        positions = prod(d or 1 for d in shape[:-1])
    steps = [*np.ravel(getattr(p.op, "strides", 1)), *np.ravel(getattr(p.op, "dilation_rate", 1))]
    inputs = weight.shape[1] // context.taps
    groups = getattr(p.op, "groups", 1)
    return Layer(kind_of(p.op), len(weight), inputs, context.taps, positions, dtype, max(map(int, steps)) > 1, groups)


def factor_sites(given: dict[Any, list[Given]], by_op: dict[Any, Place], sites: Sites) -> None:
    """A place for what runs between the two factors of a weight."""
    for op, own in given.items():
        quantize = by_op[op].quantize
        if factored(op, own) and quantize is not None and quantize.static:
            sites.inside.setdefault(op, []).insert(
                0, Site(f"{by_op[op].path}/rank", 16 if quantize.activations == "int16" else 8)
            )


def factored(op: Any, own: list[Given]) -> bool:
    """True for a layer whose weight is a product of two, which it can run one behind the other."""
    if len(own) != 1 or name_of(op) not in _FACTORED or getattr(op, "groups", 1) > 1:
        return False
    part, algorithm, _ = own[0]
    decomposes = any(type(stage).factors is not Algorithm.factors for stage in getattr(algorithm, "stages", ()))
    return decomposes and (not name_of(op).endswith("Dense") or flat_of(op, part) is not None)


def compressed_layer(p: Place, given: list[Given], sites: Sites, state: State) -> Compressed:
    """A layer with the variables of its algorithms."""
    targets: list[Target] = []
    for part, algorithm, context in given:
        weight = np.asarray(part.layout.matrix(np, keras.ops.convert_to_numpy(part.variable)), np.float32)
        path = f"{p.path}/{part.variable.name}"  # a variable's own path is another one in a loaded model
        if any(name.startswith(f"{path}/") for name in state.named):
            path += f"#{len(targets)}"
        extras = {
            name: state.add(f"{path}/{name}", extra.value, trainable=extra.trainable)
            for name, extra in algorithm.variables(weight, context).items()
        }
        quantize = p.quantize if p.quantize is not None and p.quantize.weights in _INTEGER else None
        targets.append(Target(part, algorithm, context, extras, quantize))
    layer = p.op
    linear = name_of(layer) in LINEAR
    bias = getattr(layer, "bias", None) if linear and getattr(layer, "use_bias", True) else None
    flat = flat_of(layer, targets[0].part) if len(targets) == 1 else None
    return Compressed(layer, targets, sites.folded.get(layer), bias, flat, factored(layer, given))
