"""Products that paring's own operators compute: which of TensorFlow's they stand in for, and how one is put in place.

They take weights as they are stored, so that nothing is converted or copied: int8 in the variable's own layout, or packed
(`packed`): int4 in blocks, or without zeros. Who runs such a model imports `paring.tensorflow` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from paring.errors import ParingError, UnsupportedError
from paring.formats.saved_model.axes import MOVES, Axes
from paring.formats.saved_model.flow import Flow, Source, Use
from paring.formats.saved_model.operators import ROWS
from paring.formats.saved_model.scope import BFLOAT16, FLOAT32, INT8, INT32, NATIVE, Scope, field

_HANDED = {"Identity", "StopGradient", "PreventGradient"}
_KEPT = ("strides", "dilations", "padding", "explicit_paddings")  # attributes that Conv2D has under the same names


@dataclass(frozen=True)
class Seat:
    """How one of paring's operators takes the place of one of TensorFlow's.

    Attributes:
      op: `MatMul` or `Conv2D`.
      type: TensorFlow's number of what meets the weights.
      root: What the variable is read as, before anything moves it.
      operand: The stored values as the operator reads them now; None where they are floats before they are moved.
      data: The input that meets the weights.
      sums: Dimensions of the operand that are summed over, in the order in which the other input has them.
      outs: Those that the result has, in its order; what is in neither is a dimension of the batch.
      axes: The variable's dimensions in the operand.
      shape: Of the operand.
      rank: Of the variable.
      moves: Nodes between the variable and the operator.
    """

    op: str
    type: int
    root: str
    operand: str | None
    data: int
    sums: tuple[int, ...]
    outs: tuple[int, ...]
    axes: Axes
    shape: tuple[int, ...]
    rank: int
    moves: tuple[Any, ...] = ()

    @property
    def order(self) -> tuple[int, ...]:
        """The variable's dimensions, those that are summed over first: what packed weights are laid out by."""
        return tuple(d for o in (*self.sums, *self.outs) for d in self.axes[o])

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of a convolution's kernel."""
        return (self.shape[0], self.shape[1]) if self.op == "Conv2D" else (1, 1)

    @property
    def flat(self) -> bool:
        """True where the weights are one matrix."""
        return len(self.sums) + len(self.outs) == len(self.shape)

    def matrix(self, weight: np.ndarray) -> np.ndarray:
        """A variable's values as [inputs, outputs], inputs of a kernel in the order height, width, channel."""
        order = [*self.order, *(d for d in range(weight.ndim) if d not in self.order)]  # the rest has size 1
        return np.ascontiguousarray(weight.transpose(order)).reshape(-1, prod(self.shape[o] for o in self.outs))


def register(folder: Path) -> None:
    """Loads paring's operators into TensorFlow, where a SavedModel has any.

    Raises:
      UnsupportedError: Their library is not there.
    """
    file = folder / "saved_model.pb"
    if not file.is_file() or not file.stat().st_size:
        return
    with file.open("rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as content:
        if content.find(NATIVE.encode()) >= 0:
            check_library(folder)


def check_library(folder: Path) -> None:
    """Loads paring's operators into TensorFlow.

    Raises:
      UnsupportedError: Their library is not there.
    """
    try:
        import_module("paring.tensorflow")
    except ParingError as error:
        raise UnsupportedError(
            "the SavedModel has paring's operators", where=str(folder), expected="the library that brings them",
            got=str(error).rstrip("."), todo="Or write the model with --runtime portable, for stock TensorFlow",
        ) from error  # fmt: skip


def unfolded(place: Seat, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `Seat.matrix`: [inputs, outputs] in the variable's own shape."""
    order = [*place.order, *(d for d in range(len(shape)) if d not in place.order)]
    return matrix.reshape([shape[d] for d in order]).transpose(np.argsort(order))


def seat(flow: Flow, source: Source, use: Use) -> Seat | str:
    """The place for paring's operator, or why there is none.

    Args:
      flow: The model's.
      source: A weight.
      use: One of its uses.
    """
    scope = flow.scopes[use.scope]
    node = scope.by_name[use.node]
    form = _FORMS.get(node.op)
    if form is None:
        return "it picks rows" if use.picks else f"there is no native {node.op}"
    if use.axes is None or source.shape is None:
        return "the layout of its weights cannot be told"
    shape = tuple(prod(source.shape[d] for d in group) for group in use.axes)
    found = form(scope, node, use.input, shape)
    if isinstance(found, str):
        return found
    op, type_, data, sums, outs = found
    if type_ not in (FLOAT32, BFLOAT16):
        return "it multiplies neither float32 nor bfloat16"
    if _is_weight(scope, node.input[data]):
        return "what it multiplies is a weight, too"
    way = _way(flow, scope, source, node.input[use.input], type_)
    if way is None:
        return "its weights are floats before they come here"
    return Seat(op, type_, *way[:2], data, sums, outs, use.axes, shape, len(source.shape), way[2])


def _way(
    flow: Flow, scope: Scope, source: Source, value: str, type_: int
) -> tuple[str, str | None, tuple[Any, ...]] | None:
    """How stored values come here: as what they are read, as what they could come, and by which nodes."""
    operand: str | None = value
    moved, passed = False, []
    node, _ = scope.maker(value)
    while node is not None and (node.op in MOVES or node.op == "Cast"):
        if node.op == "Cast":
            if type_ != BFLOAT16 or (field(node, "SrcT").type, field(node, "DstT").type) not in _SHORTENED:
                return None
            operand = None if moved else node.input[0]
        elif node.op not in _HANDED:
            moved = True
        passed.append(node)
        value = node.input[0]
        node, _ = scope.maker(value)
    if node is None:
        return None
    if node.op == "ReadVariableOp":
        own = source.id in flow.handles.get((scope.name, scope.canonical(node.input[0])), ())
    else:
        own = node is source.node
    return (value, operand, tuple(passed)) if own else None


def _is_weight(scope: Scope, value: str) -> bool:
    node, _ = scope.maker(value)
    while node is not None and (node.op in MOVES or node.op == "Cast"):
        node, _ = scope.maker(node.input[0])
    return node is not None and node.op in ("ReadVariableOp", "Const", "VariableV2", "Variable")


def shortened(scope: Scope, value: str) -> bool:
    """True where a float32 value was bfloat16 before, and has only been moved since."""
    node, _ = scope.maker(value)
    while node is not None and node.op in MOVES:
        node, _ = scope.maker(node.input[0])
    if node is None or node.op != "Cast":
        return False
    return (field(node, "SrcT").type, field(node, "DstT").type) == (BFLOAT16, FLOAT32)


_SHORTENED = ((FLOAT32, BFLOAT16), (INT8, BFLOAT16))
_Form = tuple[str, int, int, tuple[int, ...], tuple[int, ...]]


def _product(scope: Scope, node: Any, index: int, shape: tuple[int, ...]) -> _Form | str:
    """MatMul and BatchMatMul: (operator, type, other input, dimensions summed over, dimensions of the result)."""
    del scope
    if index == 0:
        return "its weights are on the left"
    if field(node, "transpose_a").b or field(node, "adj_x").b:
        return "its other input is transposed"
    types = {field(node, name).type for name in ("T", "Ta", "Tout") if name in node.attr}
    if len(types) > 1:
        return "it gives another type than it takes"
    last = len(shape) - 1
    turned = field(node, "transpose_b").b or field(node, "adj_y").b
    return "MatMul", next(iter(types)), 0, (last if turned else last - 1,), (last - 1 if turned else last,)


def _einsum(scope: Scope, node: Any, index: int, shape: tuple[int, ...]) -> _Form | str:
    """A sum over the other input's last dimensions whose result has the weights' own dimensions last."""
    del scope, shape
    inputs, _, result = field(node, "equation").s.decode(errors="replace").replace(" ", "").partition("->")
    parts = inputs.split(",")
    if len(parts) == 2 and "." not in parts[index]:
        own, other = parts[index], parts[1 - index]
        summed = [letter for letter in other if letter in own and letter not in result]
        before = other[: len(other) - len(summed)]
        behind = result[len(before) :]
        plain = (
            summed
            and behind
            and other == before + "".join(summed)
            and result == before + behind
            and sorted(own) == sorted({*summed, *behind})
            and not set(behind) & set(other)
        )
        if plain:
            places = [tuple(own.index(letter) for letter in letters) for letters in (summed, behind)]
            return "MatMul", field(node, "T").type, 1 - index, places[0], places[1]
    return "it is no plain matrix product"


def _convolution(scope: Scope, node: Any, index: int, shape: tuple[int, ...]) -> _Form | str:
    if field(node, "data_format").s not in (b"", b"NHWC"):
        return "its channels come first"
    channels = _channels(scope, node.input[1 - index])
    if channels is None:
        return "how many channels it reads is not known"
    if channels != shape[2]:
        return "it is grouped"
    return "Conv2D", field(node, "T").type, 0, (0, 1, 2), (3,)


def _channels(scope: Scope, value: str) -> int | None:
    """The last dimension of a value, None where the file does not say."""
    dims = sizes(scope, value)
    return dims[-1] if dims and dims[-1] >= 0 else None


def sizes(scope: Scope, value: str) -> list[int] | None:
    """The shape of a value as far as the file says, -1 where it is dynamic; None for an unknown rank."""
    node, index = scope.maker(value)
    if node is not None:
        shapes = field(node, "_output_shapes").list.shape
    else:
        known = scope.function.arg_attr
        shapes = field(known[index], "_output_shapes").list.shape if index in known else []
        if not shapes:
            shapes, place = field(scope.function, "_input_shapes").list.shape, index
            shapes = shapes[place : place + 1]
        index = 0
    if not 0 <= index < len(shapes) or shapes[index].unknown_rank:
        return None
    return [int(d.size) for d in shapes[index].dim]


_FORMS = {
    "MatMul": _product, "BatchMatMul": _product, "BatchMatMulV2": _product, "BatchMatMulV3": _product,
    "Einsum": _einsum, "Conv2D": _convolution,
}  # fmt: skip


def dense(place: Seat) -> str:
    """Why int8 weights in the variable's own layout cannot be read here; empty where they can."""
    if _turned(place) is not None:
        return ""
    if place.operand is None:
        return "its weights are floats before they are moved"
    return "" if not place.flat or _whole(place) else "its weights lie in another order"


def _turned(place: Seat) -> bool | None:
    """For weights read as they are stored, or in another shape: whether outputs come first; None where they are not."""
    sums, outs = ([d for o in group for d in place.axes[o]] for group in (place.sums, place.outs))
    if not place.flat:
        return None
    if sums + outs == sorted(sums + outs):
        return False
    return True if place.op == "MatMul" and outs + sums == sorted(sums + outs) else None


def _whole(place: Seat) -> bool:
    """True where a reshape makes the operand a matrix."""
    both = [*place.sums, *place.outs]
    return both == sorted(both) or [*place.outs, *place.sums] == sorted(both)


def factors(place: Seat, scale: np.ndarray | None, node: Any, index: int) -> np.ndarray | None:
    """Scales as the operator takes them: [outputs], or [batch, 1, outputs]; None where they belong to another dimension.

    Args:
      place: Where.
      scale: float32 of the operand's rank, 1 in each dimension that shares one; None for ones.
      node: TensorFlow's operator.
      index: Which of its inputs.
    """
    outputs = prod(place.shape[o] for o in place.outs)
    if scale is None:
        return np.ones(outputs, np.float32)
    if any(scale.shape[o] > 1 for o in place.sums):
        return None
    if place.flat:
        order = (*place.sums, *place.outs)
        full = np.broadcast_to(
            scale.transpose(order).reshape([scale.shape[o] for o in place.outs]), [place.shape[o] for o in place.outs]
        )
        return np.ascontiguousarray(full.reshape(outputs), np.float32)
    after = ROWS[node.op].after(node, index, scale, place.shape)
    return None if after is None else np.ascontiguousarray(np.broadcast_to(after, (*after.shape[:-1], outputs)))


def put(
    scope: Scope,
    node: Any,
    index: int,
    place: Seat,
    scale: np.ndarray,
    *,
    packed: bool,
    rounded: bool,
    dynamic: bool = False,
) -> None:
    """Makes a node one of paring's operators.

    Args:
      scope: Its function.
      node: TensorFlow's operator; it keeps its name.
      index: As which input it reads the weights.
      place: What `seat` gave for it.
      scale: As of `factors`.
      packed: Whether the variable holds packed weights.
      rounded: Whether what meets the weights is rounded to bfloat16.
      dynamic: Whether it becomes int8, for sparse int8 weights.
    """
    given, weights, transposed = node.input[place.data], place.root, False
    given = _before_rounding(scope, given) if rounded else given
    x, known = given, sizes(scope, scope.value(node))
    maker, _ = scope.maker(place.root)
    matrix = place.op == "MatMul" and place.flat
    rows, outputs = (prod(place.shape[o] for o in group) for group in (place.sums, place.outs))
    if not packed:
        turned, rank = _turned(place), place.rank
        transposed = place.op == "MatMul" and place.sums > place.outs if turned is None else turned
        if turned is None:
            assert place.operand is not None
            weights, rank = place.operand, len(place.shape)
        wanted = ([outputs, rows] if transposed else [rows, outputs]) if matrix else [*place.shape]
        if rank != len(wanted):
            shape = scope.constant_node(f"{node.name}/weights_shape", np.array(wanted, np.int32), maker)
            weights = scope.value(scope.add(f"{node.name}/weights", "Reshape", [weights, shape], T=INT8, Tshape=INT32))
    if matrix and len(place.sums) > 1:
        shape = _behind(scope, f"{node.name}/rows", given, place, [rows], None, maker)
        x = scope.value(scope.add(f"{node.name}/rows", "Reshape", [given, shape], T=place.type, Tshape=INT32))
    factor = scope.scale_node(f"{node.name}/scale", scale, maker)
    attributes = _attributes(node, place, packed=packed, transposed=transposed, rounded=rounded, dynamic=dynamic)
    control = [value for value in node.input if value.startswith("^")]
    scope.retyped(node, f"{NATIVE}{'Packed' if packed else ''}{place.op}", [x, weights, factor, *control], attributes)
    if matrix and len(place.outs) > 1:
        name, take = scope.follow(node, "product")
        shape = _behind(scope, name, given, place, [place.shape[o] for o in place.outs], known, maker)
        take(scope.add(name, "Reshape", [scope.value(node), shape], T=place.type, Tshape=INT32))
        if known is not None:
            del node.attr["_output_shapes"]
    # Collections of TensorFlow 1 name what a variable is read as.
    scope.dropped(m for m in place.moves if scope.name or m.op != "Identity" or m.input[0] != place.root)


def _before_rounding(scope: Scope, value: str) -> str:
    """What was rounded to bfloat16 right before, as training does it; the operator rounds it itself."""
    back, _ = scope.maker(value)
    if back is None or back.op != "Cast" or not shortened(scope, value):
        return value
    short, _ = scope.maker(back.input[0])
    cast = short is not None and short.op == "Cast" and field(short, "SrcT").type == FLOAT32
    return str(short.input[0]) if cast else value


def _attributes(
    node: Any, place: Seat, *, packed: bool, transposed: bool, rounded: bool, dynamic: bool
) -> dict[str, Any]:
    """Those of paring's operator, as TensorFlow's messages."""
    from tensorflow.core.framework.attr_value_pb2 import AttrValue

    found = {name: node.attr[name] for name in node.attr if name.startswith("_")}
    found["T"] = AttrValue(type=place.type)
    found["round_to_bfloat16"] = AttrValue(b=rounded and place.type == FLOAT32)
    if place.op == "Conv2D":
        found |= {name: node.attr[name] for name in _KEPT if name in node.attr}
    elif not packed:
        found["transpose_weights"] = AttrValue(b=transposed)
    if packed:
        found["dynamic"] = AttrValue(b=dynamic)
    kept = {}
    for name, value in found.items():
        kept[name] = AttrValue()
        kept[name].CopyFrom(value)
    return kept


def _behind(
    scope: Scope, name: str, value: str, place: Seat, last: Sequence[int], known: list[int] | None, after: Any
) -> str:
    """The shape of what is multiplied, with its summed dimensions replaced: constant where one at most is dynamic.

    `known` is the shape, as far as the file says, of something that has the same dimensions before `last`.
    """
    own, taken = sizes(scope, value), len(place.sums)
    lead = None if own is None else own[: len(own) - taken]
    if lead is None and known is not None:
        lead = known[: len(known) - len(last)]
    if lead is not None and sum(size < 0 for size in lead) <= 1:
        return scope.constant_node(f"{name}/shape", np.array([*lead, *last], np.int32), after)

    def constant(word: str, *numbers: int) -> str:
        return scope.constant_node(f"{name}/{word}", np.array(numbers, np.int32), after)

    whole = scope.add(f"{name}/shape_of", "Shape", [value], T=place.type, out_type=INT32)
    ends = [constant("from", 0), constant("to", -taken), constant("step", 1)]
    front = scope.add(f"{name}/front", "StridedSlice", [scope.value(whole), *ends], T=INT32, Index=INT32)
    front.attr["begin_mask"].i = 1
    axis = scope.constant_node(f"{name}/axis", np.asarray(0, np.int32), after)
    inputs = [scope.value(front), constant("last", *last), axis]
    joined = scope.add(f"{name}/shape", "ConcatV2", inputs, T=INT32, Tidx=INT32)
    joined.attr["N"].i = 2
    return scope.value(joined)
