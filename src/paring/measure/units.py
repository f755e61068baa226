"""Logical layers: operators that may be written as one or as several are one unit, conversions between grids are none.

Converters fuse an activation or a bias into the operator before it, put QUANTIZE and DEQUANTIZE anywhere, unpack constants
with operators. Two files of one model agree on units where they do not agree on operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from paring.graph import Graph, Op, Tensor, TensorId

CONVERSIONS = ("quantize", "dequantize", "densify", "fake_quant")
LINEAR = ("conv2d", "depthwise_conv2d", "dense", "matmul", "conv2d_transpose")
_FUSING = (*LINEAR, "add", "subtract", "multiply", "divide", "average_pool2d", "max_pool2d", "concatenate")
_ACTIVATIONS = ("relu", "relu6", "relu_n1_to_1", "relu_0_to_1")
_AFFINE = ("add", "subtract", "multiply")
# What a converter may drop or fold into what reads it: labels of other units do not mention it.
_THIN = ("reshape", "squeeze", "expand_dims", "pad", "pad_v2", "identity", "transpose")
_REGIONS = (
    "then_subgraph_index", "else_subgraph_index", "cond_subgraph_index", "body_subgraph_index",
    "decomposition_subgraph_index",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Unit:
    """One logical layer.

    Attributes:
      ops: Its operators in order: a linear one, perhaps a constant bias and an activation behind it.
      reads: What it reads beside constants, conversions looked through, in the order of its inputs.
      results: What its last operator gives.
      family: Kind, the same for operators that compute the same thing.
      shape: Of its first result, without dimensions of 1 and open ones.
      constant: The largest constant with real values that it reads.
    """

    ops: tuple[Op, ...]
    reads: tuple[TensorId, ...]
    results: tuple[TensorId, ...]
    family: str
    shape: tuple[int, ...]
    constant: Tensor | None

    @property
    def head(self) -> Op:
        """The operator that does the work, and whose name the unit has."""
        return self.ops[0]

    @property
    def name(self) -> str:
        """Name of the unit."""
        return self.head.name

    @property
    def elements(self) -> int:
        """Elements of the first result, open dimensions counted as 1."""
        return prod(self.shape)

    @property
    def thin(self) -> bool:
        """True for what may be missing in another file of the same model."""
        return self.family in ("reshape", *_THIN)

    @property
    def regions(self) -> tuple[int, ...]:
        """The subgraphs that a loop or branch runs."""
        params = self.head.params
        found = [params.get(name, 0 if self.head.kind in ("while", "if") else None) for name in _REGIONS]
        kept = {"while": found[2:4], "if": found[:2], "composite": found[4:]}.get(self.head.kind, [])
        return tuple(int(n) for n in kept if n is not None)


@dataclass(frozen=True, eq=False)
class Side:
    """The units of one subgraph.

    Attributes:
      units: In the order of the file.
      origin: Results of conversions -> what they convert, through chains of them.
      inputs: What is read and not made, in the order of the graph's inputs, else of the file.
      outputs: What leaves the subgraph, conversions looked through.
    """

    units: tuple[Unit, ...]
    origin: Mapping[TensorId, TensorId]
    inputs: tuple[TensorId, ...]
    outputs: tuple[TensorId, ...]

    @cached_property
    def maker(self) -> dict[TensorId, int]:
        """The unit that gives each tensor."""
        return {t: number for number, unit in enumerate(self.units) for t in unit.results}

    @cached_property
    def before(self) -> list[tuple[int | TensorId, ...]]:
        """For each unit the units (or the subgraph's inputs) it reads from, in order."""
        return [tuple(self.maker.get(t, t) for t in unit.reads) for unit in self.units]

    @cached_property
    def after(self) -> list[tuple[int, ...]]:
        """For each unit those that read it."""
        found: list[list[int]] = [[] for _ in self.units]
        for number, sources in enumerate(self.before):
            for source in sources:
                if isinstance(source, int) and number not in found[source]:
                    found[source].append(number)
        return [tuple(f) for f in found]


def units(graph: Graph, number: int) -> Side:
    """The logical layers of one subgraph.

    Args:
      graph: Any graph; weights are not read.
      number: The subgraph.
    """
    ops = [op for op in graph.ops if op.id[0] == number]
    origin: dict[TensorId, TensorId] = {}
    for op in ops:
        source = op.inputs[0] if op.inputs else None
        if (op.constant or op.kind in CONVERSIONS) and source is not None and op.outputs:
            origin[op.outputs[0]] = origin.get(source, source)
    rest = [op for op in ops if not op.constant and op.kind not in CONVERSIONS and op.outputs]
    reads = [_reads(graph, op, origin) for op in rest]
    count: dict[TensorId, int] = {}
    for tensors in reads:
        for tensor in set(tensors):
            count[tensor] = count.get(tensor, 0) + 1
    ends = [t for t in graph.outputs if t[0] == number]
    ends += [t for op in graph.ops for tie in op.ties for t in tie if t[0] == number]
    outputs = tuple(dict.fromkeys(origin.get(t, t) for t in ends))
    groups: list[list[Op]] = []
    taken: list[tuple[TensorId, ...]] = []
    maker: dict[TensorId, int] = {}
    for op, tensors in zip(rest, reads, strict=True):
        place = maker.get(tensors[0]) if len(tensors) == 1 else None
        if place is not None and count[tensors[0]] == 1 and tensors[0] not in outputs:
            if not _follows(graph, groups[place], op):
                place = None
        else:
            place = None
        if place is None:
            place = len(groups)
            groups.append([])
            taken.append(tensors)
        groups[place].append(op)
        maker.update(dict.fromkeys(op.outputs, place))
    found = tuple(_unit(graph, group, tensors) for group, tensors in zip(groups, taken, strict=True))
    made = {t for op in rest for t in op.outputs}
    given = [t for t in graph.inputs if t[0] == number]
    given += sorted({t for tensors in taken for t in tensors} - made - set(given))
    return Side(found, origin, tuple(given), outputs)


def _reads(graph: Graph, op: Op, origin: Mapping[TensorId, TensorId]) -> tuple[TensorId, ...]:
    found = [t for t in op.inputs if t is not None and graph.tensors[t].weight is None]
    sources = [origin.get(t, t) for t in found]
    return tuple(t for t in sources if graph.tensors[t].weight is None)


def _follows(graph: Graph, group: list[Op], op: Op) -> bool:
    """True where `op` could as well be part of the operators before it."""
    head = group[0]
    active = bool(head.params.get("fused_activation_function", 0)) or group[-1].kind in _ACTIVATIONS
    if active or (head.kind == "matmul" and _constant(graph, head) is None):
        return False
    if op.kind in _ACTIVATIONS:
        return head.kind in _FUSING
    if op.kind not in _AFFINE or head.kind not in LINEAR or len(op.outputs) != 1:
        return False
    other = _constant(graph, op)
    width = graph.tensors[op.outputs[0]].shape[-1:]
    return other is not None and prod(other.shape) in (1, *width) and other.shape[-1:] in ((), (1,), width)


def _constant(graph: Graph, op: Op) -> Tensor | None:
    """The largest constant of real values that an operator reads."""
    found = [graph.tensors[t] for t in op.inputs if t is not None]
    real = [t for t in found if t.weight is not None and (t.weight.dtype == "float32" or t.quantization is not None)]
    return max(real, key=lambda t: prod(t.shape), default=None)


def _unit(graph: Graph, group: list[Op], reads: tuple[TensorId, ...]) -> Unit:
    head, results = group[0], group[-1].outputs
    constant = _constant(graph, head)
    shape = tuple(d for d in graph.tensors[results[0]].shape if d not in (1, -1))
    return Unit(tuple(group), reads, results, _family(head, constant), shape, constant)


def _family(op: Op, constant: Tensor | None) -> str:
    if op.kind in ("conv2d", "depthwise_conv2d", "dense", "matmul") and constant is not None:
        return "linear"
    if op.kind in ("reshape", "squeeze", "expand_dims"):
        return "reshape"
    if op.kind in ("pad", "pad_v2"):
        return "pad"
    return "pool" if op.kind in ("mean", "average_pool2d") else op.kind
