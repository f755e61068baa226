"""Output shapes that follow from input shapes, constants and options: one row per operator whose rule is simple.

A file whose shapes contradict each other is refused before anything runs it: one flipped dimension could otherwise ask for
gigabytes of activations. Operators without a row are left to the runtime, in its child process. A dimension of -1 is dynamic
and fits everything; None stands for a shape that the file does not give.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from paring.formats.tflite.flatbuffer import Malformed, Table

Shape = tuple[int, ...]
Found = Sequence["Shape | None"]

SAME, VALID = 0, 1


@dataclass(frozen=True)
class Site:
    """One operator as the rules see it.

    Attributes:
      ins: Shapes of its inputs; None where absent or not given.
      outs: Shapes of its outputs.
      constant: The integers of a small constant input, None for any other.
      options: Its options table.
    """

    ins: tuple[Shape | None, ...]
    outs: tuple[Shape | None, ...]
    constant: Callable[[int], list[int] | None]
    options: Table | None

    def option(self, kind: str, name: str) -> Any:
        """A field of the options, which must be of this kind."""
        if self.options is None or self.options.type_name != kind:
            got = "none" if self.options is None else self.options.type_name
            raise Malformed(f"needs {kind} and has {got}")
        return getattr(self.options, name)


def check_shapes(site: Site, native: str) -> None:
    """Raises Malformed where the outputs of an operator do not follow from its inputs."""
    rule = RULES.get(native)
    if rule is None:
        return
    try:
        expected = rule(site)
    except (IndexError, ZeroDivisionError) as error:
        raise Malformed(f"has {len(site.ins)} inputs of shapes {_shown(site.ins)}, which it cannot take") from error
    for got, want in zip(site.outs, expected, strict=False):
        if got is not None and want is not None and not _fits(got, want):
            raise Malformed(f"gives shape {_list(want)}, its output says {_list(got)}")


def _fits(got: Shape, want: Shape) -> bool:
    return len(got) == len(want) and all(a == b or a < 0 or b < 0 for a, b in zip(got, want, strict=True))


def _list(shape: Shape) -> str:
    return str(list(shape[:16]))


def _shown(shapes: Found) -> str:
    return ", ".join("none" if s is None else _list(s) for s in shapes[:8])


def _count(shape: Shape) -> int:
    """Elements, -1 where dynamic."""
    return -1 if any(d < 0 for d in shape) else math.prod(shape)


def _replaced(shape: Shape, axis: int, size: int) -> Shape:
    axis = _axis(axis, len(shape))
    return (*shape[:axis], size, *shape[axis + 1 :])


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise Malformed(f"works along dimension {axis} of a tensor with {rank}")
    return axis % rank


def _ranked(shape: Shape | None, rank: int, what: str) -> Shape | None:
    if shape is not None and len(shape) != rank:
        raise Malformed(f"has {what} of shape {_list(shape)}, expected {rank} dimensions")
    return shape


# -- rules ---------------------------------------------------------------------------------------------------------


def _same(site: Site) -> Found:
    return [site.ins[0]] * len(site.outs)


def _broadcast(site: Site) -> Found:
    shapes = site.ins
    if len(shapes) < 2:
        raise IndexError
    if any(s is None for s in shapes):
        return [None]
    known = [s for s in shapes if s is not None]
    rank = max(len(s) for s in known)
    padded = [(1,) * (rank - len(s)) + s for s in known]
    result = []
    for sizes in zip(*padded, strict=True):
        fixed = {d for d in sizes if d not in (1, -1)}
        if len(fixed) > 1:
            raise Malformed(f"takes shapes {_shown(shapes)}, which do not broadcast")
        result.append(fixed.pop() if fixed else -1 if -1 in sizes else 1)
    return [tuple(result)]


def _window(size: int, window: int, stride: int, dilation: int, padding: int) -> int:
    """Output positions of a sliding window, as LiteRT counts them."""
    if size < 0 or window < 0:
        return -1
    if padding == SAME:
        return -(-size // stride)
    if padding != VALID:
        raise Malformed(f"has the unknown padding {padding}")
    reach = (window - 1) * dilation + 1
    if reach > size:
        raise Malformed(f"slides a window of {reach} over {size} positions")
    return (size - reach + stride) // stride


def _slide(site: Site, kind: str, shape: Shape, window: Sequence[int], axes: str, *, dilated: bool = True) -> list[int]:
    padding = site.option(kind, "padding")
    return [
        _window(
            size, w, site.option(kind, f"stride_{axis}"), site.option(kind, f"dilation_{axis}_factor") if dilated else 1, padding
        )
        for size, w, axis in zip(shape[1:-1], window, axes, strict=True)
    ]  # fmt: skip


def _bias(site: Site, port: int, channels: int) -> None:
    bias = site.ins[port] if port < len(site.ins) else None
    if bias is not None and channels >= 0 and _count(bias) not in (-1, channels):
        raise Malformed(f"has {channels} channels and a bias of shape {_list(bias)}")


def _conv(kind: str, axes: str) -> Callable[[Site], Found]:
    rank = len(axes) + 2

    def rule(site: Site) -> Found:
        data, weights = _ranked(site.ins[0], rank, "an input"), _ranked(site.ins[1], rank, "weights")
        if data is None or weights is None:
            site.option(kind, "padding")
            return [None]
        channels, inputs = (weights[0], weights[3]) if rank == 4 else (weights[4], weights[3])
        if inputs > 0 and data[-1] >= 0 and data[-1] % inputs or inputs == 0:
            raise Malformed(f"has {data[-1]} input channels and weights of shape {_list(weights)}")
        _bias(site, 2, channels)
        window = weights[1:3] if rank == 4 else weights[:3]
        return [(data[0], *_slide(site, kind, data, window, axes), channels)]

    return rule


def _depthwise(site: Site) -> Found:
    kind = "DepthwiseConv2DOptions"
    data, weights = _ranked(site.ins[0], 4, "an input"), _ranked(site.ins[1], 4, "weights")
    if data is None or weights is None:
        site.option(kind, "padding")
        return [None]
    if data[3] == 0 or (data[3] > 0 and weights[3] % data[3]) or weights[0] != 1:
        raise Malformed(f"has {data[3]} input channels and weights of shape {_list(weights)}")
    _bias(site, 2, weights[3])
    return [(data[0], *_slide(site, kind, data, weights[1:3], "hw"), weights[3])]


def _transpose_conv(site: Site) -> Found:
    site.option("TransposeConvOptions", "padding")
    shape, weights, data = site.constant(0), _ranked(site.ins[1], 4, "weights"), _ranked(site.ins[2], 4, "an input")
    if weights is not None:
        if data is not None and data[3] >= 0 and data[3] != weights[3]:
            raise Malformed(f"has {data[3]} input channels and weights of shape {_list(weights)}")
        _bias(site, 3, weights[0])
    if shape is not None and weights is not None and (len(shape) != 4 or shape[3] != weights[0]):
        raise Malformed(f"is to give shape {shape[:8]} from weights of shape {_list(weights)}")
    return [None if shape is None else tuple(shape)]


def _pool(site: Site) -> Found:
    kind = "Pool2DOptions"
    window = [site.option(kind, "filter_height"), site.option(kind, "filter_width")]
    if min(window) <= 0:
        raise Malformed(f"has a window of {window}, which must be above 0")
    data = _ranked(site.ins[0], 4, "an input")
    return [None if data is None else (data[0], *_slide(site, kind, data, window, "hw", dilated=False), data[3])]


def _dense(site: Site) -> Found:
    site.option("FullyConnectedOptions", "keep_num_dims")
    data, weights, out = site.ins[0], _ranked(site.ins[1], 2, "weights"), site.outs[0]
    if weights is None or min(weights) < 0:
        return [None]
    units, inputs = weights
    if inputs == 0 or units == 0:
        raise Malformed(f"has weights of shape {_list(weights)}")
    _bias(site, 2, units)
    if out is not None and (not out or out[-1] not in (-1, units)):
        raise Malformed(f"has {units} units, its output says {_list(out)}")
    if data is None or _count(data) < 0:
        return [None]
    rows, rest = divmod(_count(data), inputs)
    if rest or (out is not None and _count(out) not in (-1, rows * units)):
        raise Malformed(f"multiplies shape {_list(data)} by weights of shape {_list(weights)}" + (f" into {_list(out)}" if out else ""))
    return [None]


def _matmul(site: Site) -> Found:
    a, b = site.ins[0], site.ins[1]
    if a is None or b is None:
        return [None]
    if min(len(a), len(b)) < 2:
        raise Malformed(f"multiplies shapes {_shown(site.ins)}")
    rows, inner = (a[-1], a[-2]) if site.option("BatchMatMulOptions", "adj_x") else (a[-2], a[-1])
    other, columns = (b[-1], b[-2]) if site.option("BatchMatMulOptions", "adj_y") else (b[-2], b[-1])
    if inner != other and min(inner, other) >= 0:
        raise Malformed(f"multiplies shapes {_shown(site.ins)}")
    batch = _broadcast(Site((a[:-2], b[:-2]), (), site.constant, None))[0]
    return [None if batch is None else (*batch, rows, columns)]


def _concatenation(site: Site) -> Found:
    shapes = [s for s in site.ins if s is not None]
    if len(shapes) < len(site.ins) or not shapes:
        return [None]
    first = shapes[0]
    axis = _axis(site.option("ConcatenationOptions", "axis"), len(first))
    for shape in shapes:
        if len(shape) != len(first) or not _fits(_replaced(shape, axis, -1), _replaced(first, axis, -1)):
            raise Malformed(f"joins shapes {_shown(shapes)} along dimension {axis}")
    sizes = [s[axis] for s in shapes]
    known = [max((s[d] for s in shapes), default=-1) for d in range(len(first))]
    return [_replaced(tuple(known), axis, -1 if min(sizes) < 0 else sum(sizes))]


def _recount(site: Site) -> Found:
    data, out = site.ins[0], site.outs[0]
    if data is not None and out is not None and min(_count(data), _count(out)) >= 0 and _count(data) != _count(out):
        raise Malformed(f"turns shape {_list(data)} into {_list(out)}, which has another number of elements")
    return [None]


def _reshape(site: Site) -> Found:
    _recount(site)
    wanted = site.constant(1) if len(site.ins) > 1 else None
    return [None if wanted is None or 0 in wanted else tuple(wanted)]


def _reduce(site: Site) -> Found:
    data, axes = site.ins[0], site.constant(1)
    if data is None or axes is None:
        return [None]
    gone = {_axis(a, len(data)) for a in axes}
    if site.option("ReducerOptions", "keep_dims"):
        return [tuple(1 if d in gone else size for d, size in enumerate(data))]
    return [tuple(size for d, size in enumerate(data) if d not in gone)]


def _transpose(site: Site) -> Found:
    data, order = site.ins[0], site.constant(1)
    if data is None or order is None:
        return [None]
    if sorted(a % max(1, len(data)) for a in order) != list(range(len(data))):
        raise Malformed(f"puts {len(data)} dimensions in the order {order[:16]}")
    return [tuple(data[a % len(data)] for a in order)]


def _pad(site: Site) -> Found:
    data, pads = site.ins[0], site.constant(1)
    if data is None or pads is None:
        return [None]
    if len(pads) != 2 * len(data) or min(pads, default=0) < 0:
        raise Malformed(f"pads shape {_list(data)} by {pads[:16]}")
    return [tuple(-1 if d < 0 else d + pads[2 * i] + pads[2 * i + 1] for i, d in enumerate(data))]


def _resize(site: Site) -> Found:
    data, size = _ranked(site.ins[0], 4, "an input"), site.constant(1)
    if size is not None and (len(size) != 2 or min(size) <= 0):
        raise Malformed(f"resizes to {size[:8]}")
    return [None if data is None or size is None else (data[0], *size, data[3])]


def _split(site: Site) -> Found:
    axis, data = site.constant(0), site.ins[1]
    if axis is None or data is None:
        return [None]
    axis_ = _axis(axis[0], len(data))
    if data[axis_] % len(site.outs) and data[axis_] > 0:
        raise Malformed(f"splits dimension {axis_} of shape {_list(data)} into {len(site.outs)}")
    return [_replaced(data, axis_, data[axis_] // len(site.outs) if data[axis_] >= 0 else -1)] * len(site.outs)


def _split_v(site: Site) -> Found:
    data, sizes, axis = site.ins[0], site.constant(1), site.constant(2)
    if data is None or sizes is None or axis is None or -1 in sizes:
        return [None]
    if len(sizes) != len(site.outs) or min(sizes) < 0 or data[_axis(axis[0], len(data))] not in (-1, sum(sizes)):
        raise Malformed(f"splits shape {_list(data)} into {sizes[:16]}")
    return [_replaced(data, axis[0], size) for size in sizes]


def _pack(site: Site) -> Found:
    data = site.ins[0]
    if data is None:
        return [None]
    axis = _axis(site.option("PackOptions", "axis"), len(data) + 1)
    return [(*data[:axis], len(site.ins), *data[axis:])]


def _unpack(site: Site) -> Found:
    data = site.ins[0]
    if data is None:
        return [None]
    axis = _axis(site.option("UnpackOptions", "axis"), len(data))
    if data[axis] not in (-1, len(site.outs)):
        raise Malformed(f"gives {len(site.outs)} parts of dimension {axis} of shape {_list(data)}")
    return [(*data[:axis], *data[axis + 1 :])] * len(site.outs)


def _gather(site: Site) -> Found:
    data, indices = site.ins[0], site.ins[1]
    if data is None or indices is None:
        return [None]
    axis = _axis(site.option("GatherOptions", "axis"), len(data))
    batch = site.option("GatherOptions", "batch_dims")
    if not 0 <= batch <= min(axis, len(indices)):
        return [None]
    return [(*data[:axis], *indices[batch:], *data[axis + 1 :])]


def _gather_nd(site: Site) -> Found:
    data, indices = site.ins[0], site.ins[1]
    if data is None or not indices or indices[-1] < 0:
        return [None]
    if indices[-1] > len(data):
        raise Malformed(f"takes {indices[-1]} indices into shape {_list(data)}")
    return [(*indices[:-1], *data[indices[-1] :])]


def _embedding(site: Site) -> Found:
    indices, table = site.ins[0], site.ins[1]
    if table is not None and len(table) < 2:
        raise Malformed(f"has a table of shape {_list(table)}")
    return [None if indices is None or table is None else (*indices, *table[1:])]


def _part(site: Site) -> Found:
    """A slice: no more elements than its source."""
    data, out = site.ins[0], site.outs[0]
    if data is not None and out is not None and 0 <= _count(data) < _count(out):
        raise Malformed(f"takes shape {_list(out)} out of {_list(data)}")
    return [None]


def _tile(site: Site) -> Found:
    data, times = site.ins[0], site.constant(1)
    if data is None or times is None:
        return [None]
    if len(times) != len(data) or min(times, default=0) < 0:
        raise Malformed(f"repeats shape {_list(data)} {times[:16]} times")
    return [tuple(-1 if d < 0 else d * t for d, t in zip(data, times, strict=True))]


def _stated(port: int) -> Callable[[Site], Found]:
    def rule(site: Site) -> Found:
        shape = site.constant(port)
        return [None if shape is None else tuple(shape)]

    return rule


def _depth_to_space(site: Site) -> Found:
    data, block = _ranked(site.ins[0], 4, "an input"), site.option("DepthToSpaceOptions", "block_size")
    if block <= 0 or (data is not None and data[3] >= 0 and data[3] % block**2):
        raise Malformed(f"spreads {'' if data is None else data[3]} channels over blocks of {block}")
    return [None if data is None else (data[0], *(-1 if d < 0 else d * block for d in data[1:3]), data[3] // block**2)]


def _space_to_depth(site: Site) -> Found:
    data, block = _ranked(site.ins[0], 4, "an input"), site.option("SpaceToDepthOptions", "block_size")
    if block <= 0 or (data is not None and any(d >= 0 and d % block for d in data[1:3])):
        raise Malformed(f"gathers blocks of {block} of shape {'' if data is None else _list(data)}")
    return [None if data is None else (data[0], *(-1 if d < 0 else d // block for d in data[1:3]), data[3] * block**2)]


def _blocks(site: Site, sign: int) -> Found:
    """SPACE_TO_BATCH_ND (1) and BATCH_TO_SPACE_ND (-1)."""
    data, block, edges = site.ins[0], site.constant(1), site.constant(2)
    if data is None or block is None or edges is None:
        return [None]
    inner = data[1 : 1 + len(block)]
    if len(inner) != len(block) or len(edges) != 2 * len(block) or min(block, default=1) <= 0 or min(edges, default=0) < 0:
        raise Malformed(f"takes blocks of {block[:8]} with edges {edges[:8]} of shape {_list(data)}")
    area = math.prod(block)
    sizes = []
    for d, b, low, high in zip(inner, block, edges[::2], edges[1::2], strict=True):
        sizes.append(-1 if d < 0 else (d + low + high) // b if sign > 0 else d * b - low - high)
        if d >= 0 and (sizes[-1] < 0 or (sign > 0 and (d + low + high) % b)):
            raise Malformed(f"takes blocks of {block[:8]} with edges {edges[:8]} of shape {_list(data)}")
    batch = -1 if data[0] < 0 else data[0] * area if sign > 0 else data[0] // area
    return [(batch, *sizes, *data[1 + len(block) :])]


def _one_hot(site: Site) -> Found:
    data, depth = site.ins[0], site.constant(1)
    if data is None or not depth:
        return [None]
    axis = _axis(site.option("OneHotOptions", "axis"), len(data) + 1)
    return [(*data[:axis], depth[0], *data[axis:])]


def _arg(site: Site) -> Found:
    data, axis = site.ins[0], site.constant(1)
    if data is None or not axis:
        return [None]
    place = _axis(axis[0], len(data))
    return [(*data[:place], *data[place + 1 :])]


def _top_k(site: Site) -> Found:
    data, k = site.ins[0], site.constant(1)
    return [None if not data or not k else (*data[:-1], k[0])] * 2


def _sequence(port: int, dimension: int) -> Callable[[Site], Found]:
    """A recurrent layer: as many outputs a step as its recurrent weights say."""

    def rule(site: Site) -> Found:
        data = site.ins[0]
        if len(site.ins) <= port:
            raise IndexError
        weights = _ranked(site.ins[port], 2, "recurrent weights")
        return [None if not data or weights is None else (*data[:-1], weights[dimension])]

    return rule


def _svdf(site: Site) -> Found:
    data, weights, rank = site.ins[0], _ranked(site.ins[1], 2, "weights"), site.option("SVDFOptions", "rank")
    if rank <= 0 or (weights is not None and weights[0] % rank):
        raise Malformed(f"has rank {rank} and weights of shape {'' if weights is None else _list(weights)}")
    return [None if not data or weights is None else (data[0], weights[0] // rank)]


def _rows(names: str, rule: Callable[[Site], Found]) -> dict[str, Callable[[Site], Found]]:
    return dict.fromkeys(names.split(), rule)


RULES: Mapping[str, Callable[[Site], Found]] = MappingProxyType(
    _rows("CONV_2D", _conv("Conv2DOptions", "hw"))
    | _rows("CONV_3D", _conv("Conv3DOptions", "dhw"))
    | _rows("DEPTHWISE_CONV_2D", _depthwise)
    | _rows("TRANSPOSE_CONV", _transpose_conv)
    | _rows("AVERAGE_POOL_2D MAX_POOL_2D L2_POOL_2D", _pool)
    | _rows("FULLY_CONNECTED", _dense)
    | _rows("BATCH_MATMUL", _matmul)
    | _rows("ADD SUB MUL DIV MINIMUM MAXIMUM SQUARED_DIFFERENCE POW FLOOR_DIV FLOOR_MOD PRELU SELECT_V2", _broadcast)
    | _rows("EQUAL NOT_EQUAL GREATER GREATER_EQUAL LESS LESS_EQUAL LOGICAL_AND LOGICAL_OR", _broadcast)
    | _rows("RELU RELU6 RELU_N1_TO_1 RELU_0_TO_1 LEAKY_RELU ELU HARD_SWISH GELU LOGISTIC TANH SOFTMAX LOG_SOFTMAX", _same)
    | _rows("EXP LOG SQRT RSQRT SQUARE ABS NEG SIN COS FLOOR CEIL ROUND SIGN LOGICAL_NOT L2_NORMALIZATION", _same)
    | _rows("CAST QUANTIZE DEQUANTIZE DENSIFY FAKE_QUANT CUMSUM REVERSE_V2 REVERSE_SEQUENCE ZEROS_LIKE", _same)
    | _rows("LOCAL_RESPONSE_NORMALIZATION MATRIX_SET_DIAG DYNAMIC_UPDATE_SLICE", _same)
    | _rows("CONCATENATION", _concatenation)
    | _rows("RESHAPE", _reshape)
    | _rows("SQUEEZE EXPAND_DIMS", _recount)
    | _rows("MEAN SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD REDUCE_ANY REDUCE_ALL", _reduce)
    | _rows("TRANSPOSE", _transpose)
    | _rows("PAD PADV2", _pad)
    | _rows("RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR", _resize)
    | _rows("SPLIT", _split)
    | _rows("SPLIT_V", _split_v)
    | _rows("PACK", _pack)
    | _rows("UNPACK", _unpack)
    | _rows("GATHER", _gather)
    | _rows("GATHER_ND", _gather_nd)
    | _rows("EMBEDDING_LOOKUP", _embedding)
    | _rows("SLICE STRIDED_SLICE", _part)
    | _rows("TILE", _tile)
    | _rows("FILL", _stated(0))
    | _rows("BROADCAST_TO", _stated(1))
    | _rows("DEPTH_TO_SPACE", _depth_to_space)
    | _rows("SPACE_TO_DEPTH", _space_to_depth)
    | _rows("SPACE_TO_BATCH_ND", lambda site: _blocks(site, 1))
    | _rows("BATCH_TO_SPACE_ND", lambda site: _blocks(site, -1))
    | _rows("ONE_HOT", _one_hot)
    | _rows("ARG_MAX ARG_MIN", _arg)
    | _rows("TOPK_V2", _top_k)
    | _rows("UNIDIRECTIONAL_SEQUENCE_LSTM", _sequence(6, 1))
    | _rows("UNIDIRECTIONAL_SEQUENCE_RNN", _sequence(2, 0))
    | _rows("SVDF", _svdf)
)
