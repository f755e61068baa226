"""Output shapes from input shapes, constants and options: one function for each rule, counted as LiteRT counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from paring.formats.tflite.flatbuffer import Malformed
from paring.formats.tflite.shape_site import Found, Shape, Site, axis_of, count, fits, listed, ranked, replaced, shown

SAME, VALID = 0, 1


def same(site: Site) -> Found:
    """Outputs like the first input."""
    return [site.ins[0]] * len(site.outs)


def broadcast(site: Site) -> Found:
    """One output, dimensions of 1 stretched."""
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
            raise Malformed(f"takes shapes {shown(shapes)}, which do not broadcast")
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
    padding, sizes = site.option(kind, "padding"), []
    for size, reach, axis in zip(shape[1:-1], window, axes, strict=True):
        dilation = site.option(kind, f"dilation_{axis}_factor") if dilated else 1
        sizes.append(_window(size, reach, site.option(kind, f"stride_{axis}"), dilation, padding))
    return sizes


def _bias(site: Site, port: int, channels: int) -> None:
    bias = site.ins[port] if port < len(site.ins) else None
    if bias is not None and channels >= 0 and count(bias) not in (-1, channels):
        raise Malformed(f"has {channels} channels and a bias of shape {listed(bias)}")


def conv(kind: str, axes: str) -> Callable[[Site], Found]:
    """A convolution with weights [out, window, in] (3-D: [window, in, out])."""
    rank = len(axes) + 2

    def rule(site: Site) -> Found:
        data, weights = ranked(site.ins[0], rank, "an input"), ranked(site.ins[1], rank, "weights")
        if data is None or weights is None:
            site.option(kind, "padding")
            return [None]
        channels, inputs = (weights[0], weights[3]) if rank == 4 else (weights[4], weights[3])
        if (inputs > 0 and data[-1] >= 0 and data[-1] % inputs) or inputs == 0:
            raise Malformed(f"has {data[-1]} input channels and weights of shape {listed(weights)}")
        _bias(site, 2, channels)
        window = weights[1:3] if rank == 4 else weights[:3]
        return [(data[0], *_slide(site, kind, data, window, axes), channels)]

    return rule


def depthwise(site: Site) -> Found:
    """A depthwise convolution, weights [1, window, channels]."""
    kind = "DepthwiseConv2DOptions"
    data, weights = ranked(site.ins[0], 4, "an input"), ranked(site.ins[1], 4, "weights")
    if data is None or weights is None:
        site.option(kind, "padding")
        return [None]
    if data[3] == 0 or (data[3] > 0 and weights[3] % data[3]) or weights[0] != 1:
        raise Malformed(f"has {data[3]} input channels and weights of shape {listed(weights)}")
    _bias(site, 2, weights[3])
    return [(data[0], *_slide(site, kind, data, weights[1:3], "hw"), weights[3])]


def transpose_conv(site: Site) -> Found:
    """A transposed convolution: the shape is its first input."""
    site.option("TransposeConvOptions", "padding")
    shape, weights, data = site.constant(0), ranked(site.ins[1], 4, "weights"), ranked(site.ins[2], 4, "an input")
    if weights is not None:
        if data is not None and data[3] >= 0 and data[3] != weights[3]:
            raise Malformed(f"has {data[3]} input channels and weights of shape {listed(weights)}")
        _bias(site, 3, weights[0])
    if shape is not None and weights is not None and (len(shape) != 4 or shape[3] != weights[0]):
        raise Malformed(f"is to give shape {shape[:8]} from weights of shape {listed(weights)}")
    return [None if shape is None else tuple(shape)]


def pool(site: Site) -> Found:
    """A sliding window without weights."""
    kind = "Pool2DOptions"
    window = [site.option(kind, "filter_height"), site.option(kind, "filter_width")]
    if min(window) <= 0:
        raise Malformed(f"has a window of {window}, which must be above 0")
    data = ranked(site.ins[0], 4, "an input")
    return [None if data is None else (data[0], *_slide(site, kind, data, window, "hw", dilated=False), data[3])]


def dense(site: Site) -> Found:
    """Rows of inputs times weights [units, inputs]; how many dimensions the rows have is free."""
    site.option("FullyConnectedOptions", "keep_num_dims")
    data, weights, out = site.ins[0], ranked(site.ins[1], 2, "weights"), site.outs[0]
    if weights is None or min(weights) < 0:
        return [None]
    units, inputs = weights
    if inputs == 0 or units == 0:
        raise Malformed(f"has weights of shape {listed(weights)}")
    _bias(site, 2, units)
    if out is not None and (not out or out[-1] not in (-1, units)):
        raise Malformed(f"has {units} units, its output says {listed(out)}")
    if data is None or count(data) < 0:
        return [None]
    rows, rest = divmod(count(data), inputs)
    if rest or (out is not None and count(out) not in (-1, rows * units)):
        raise Malformed(
            f"multiplies shape {listed(data)} by weights of shape {listed(weights)}"
            + (f" into {listed(out)}" if out else "")
        )
    return [None]


def matmul(site: Site) -> Found:
    """A product of the last two dimensions, the others stretched."""
    a, b = site.ins[0], site.ins[1]
    if a is None or b is None:
        return [None]
    if min(len(a), len(b)) < 2:
        raise Malformed(f"multiplies shapes {shown(site.ins)}")
    rows, inner = (a[-1], a[-2]) if site.option("BatchMatMulOptions", "adj_x") else (a[-2], a[-1])
    other, columns = (b[-1], b[-2]) if site.option("BatchMatMulOptions", "adj_y") else (b[-2], b[-1])
    if inner != other and min(inner, other) >= 0:
        raise Malformed(f"multiplies shapes {shown(site.ins)}")
    batch = broadcast(Site((a[:-2], b[:-2]), (), site.constant, None))[0]
    return [None if batch is None else (*batch, rows, columns)]


def concatenation(site: Site) -> Found:
    """Joined along one dimension."""
    shapes = [s for s in site.ins if s is not None]
    if len(shapes) < len(site.ins) or not shapes:
        return [None]
    first = shapes[0]
    axis = axis_of(site.option("ConcatenationOptions", "axis"), len(first))
    for shape in shapes:
        if len(shape) != len(first) or not fits(replaced(shape, axis, -1), replaced(first, axis, -1)):
            raise Malformed(f"joins shapes {shown(shapes)} along dimension {axis}")
    sizes = [s[axis] for s in shapes]
    known = [max((s[d] for s in shapes), default=-1) for d in range(len(first))]
    return [replaced(tuple(known), axis, -1 if min(sizes) < 0 else sum(sizes))]


def recount(site: Site) -> Found:
    """The same elements in another shape."""
    data, out = site.ins[0], site.outs[0]
    if data is not None and out is not None and min(count(data), count(out)) >= 0 and count(data) != count(out):
        raise Malformed(f"turns shape {listed(data)} into {listed(out)}, which has another number of elements")
    return [None]


def reshape(site: Site) -> Found:
    """The same elements in the shape that a constant states."""
    recount(site)
    wanted = site.constant(1) if len(site.ins) > 1 else None
    return [None if wanted is None or 0 in wanted else tuple(wanted)]


def reduce(site: Site) -> Found:
    """Dimensions that are gone, or 1."""
    data, axes = site.ins[0], site.constant(1)
    if data is None or axes is None:
        return [None]
    gone = {axis_of(a, len(data)) for a in axes}
    if site.option("ReducerOptions", "keep_dims"):
        return [tuple(1 if d in gone else size for d, size in enumerate(data))]
    return [tuple(size for d, size in enumerate(data) if d not in gone)]


def transpose(site: Site) -> Found:
    """Dimensions in another order."""
    data, order = site.ins[0], site.constant(1)
    if data is None or order is None:
        return [None]
    if sorted(a % max(1, len(data)) for a in order) != list(range(len(data))):
        raise Malformed(f"puts {len(data)} dimensions in the order {order[:16]}")
    return [tuple(data[a % len(data)] for a in order)]


def pad(site: Site) -> Found:
    """Edges added."""
    data, pads = site.ins[0], site.constant(1)
    if data is None or pads is None:
        return [None]
    if len(pads) != 2 * len(data) or min(pads, default=0) < 0:
        raise Malformed(f"pads shape {listed(data)} by {pads[:16]}")
    return [tuple(-1 if d < 0 else d + pads[2 * i] + pads[2 * i + 1] for i, d in enumerate(data))]


def resize(site: Site) -> Found:
    """Height and width from a constant."""
    data, size = ranked(site.ins[0], 4, "an input"), site.constant(1)
    if size is not None and (len(size) != 2 or min(size) <= 0):
        raise Malformed(f"resizes to {size[:8]}")
    return [None if data is None or size is None else (data[0], *size, data[3])]


def split(site: Site) -> Found:
    """Equal parts."""
    axis, data = site.constant(0), site.ins[1]
    if axis is None or data is None:
        return [None]
    axis_ = axis_of(axis[0], len(data))
    if data[axis_] % len(site.outs) and data[axis_] > 0:
        raise Malformed(f"splits dimension {axis_} of shape {listed(data)} into {len(site.outs)}")
    return [replaced(data, axis_, data[axis_] // len(site.outs) if data[axis_] >= 0 else -1)] * len(site.outs)


def split_v(site: Site) -> Found:
    """Parts of stated sizes."""
    data, sizes, axis = site.ins[0], site.constant(1), site.constant(2)
    if data is None or sizes is None or axis is None or -1 in sizes:
        return [None]
    if len(sizes) != len(site.outs) or min(sizes) < 0 or data[axis_of(axis[0], len(data))] not in (-1, sum(sizes)):
        raise Malformed(f"splits shape {listed(data)} into {sizes[:16]}")
    return [replaced(data, axis[0], size) for size in sizes]


def pack(site: Site) -> Found:
    """A new dimension, one place for each input."""
    data = site.ins[0]
    if data is None:
        return [None]
    axis = axis_of(site.option("PackOptions", "axis"), len(data) + 1)
    return [(*data[:axis], len(site.ins), *data[axis:])]


def unpack(site: Site) -> Found:
    """A dimension taken apart."""
    data = site.ins[0]
    if data is None:
        return [None]
    axis = axis_of(site.option("UnpackOptions", "axis"), len(data))
    if data[axis] not in (-1, len(site.outs)):
        raise Malformed(f"gives {len(site.outs)} parts of dimension {axis} of shape {listed(data)}")
    return [(*data[:axis], *data[axis + 1 :])] * len(site.outs)


def gather(site: Site) -> Found:
    """One dimension replaced by those of the indices."""
    data, indices = site.ins[0], site.ins[1]
    if data is None or indices is None:
        return [None]
    axis = axis_of(site.option("GatherOptions", "axis"), len(data))
    batch = site.option("GatherOptions", "batch_dims")
    if not 0 <= batch <= min(axis, len(indices)):
        return [None]
    return [(*data[:axis], *indices[batch:], *data[axis + 1 :])]


def gather_nd(site: Site) -> Found:
    """Leading dimensions replaced by those of the indices."""
    data, indices = site.ins[0], site.ins[1]
    if data is None or not indices or indices[-1] < 0:
        return [None]
    if indices[-1] > len(data):
        raise Malformed(f"takes {indices[-1]} indices into shape {listed(data)}")
    return [(*indices[:-1], *data[indices[-1] :])]


def embedding(site: Site) -> Found:
    """Rows of a table."""
    indices, table = site.ins[0], site.ins[1]
    if table is not None and len(table) < 2:
        raise Malformed(f"has a table of shape {listed(table)}")
    return [None if indices is None or table is None else (*indices, *table[1:])]


def part(site: Site) -> Found:
    """A slice: no more elements than its source."""
    data, out = site.ins[0], site.outs[0]
    if data is not None and out is not None and 0 <= count(data) < count(out):
        raise Malformed(f"takes shape {listed(out)} out of {listed(data)}")
    return [None]


def tile(site: Site) -> Found:
    """Repeated."""
    data, times = site.ins[0], site.constant(1)
    if data is None or times is None:
        return [None]
    if len(times) != len(data) or min(times, default=0) < 0:
        raise Malformed(f"repeats shape {listed(data)} {times[:16]} times")
    return [tuple(-1 if d < 0 else d * t for d, t in zip(data, times, strict=True))]


def stated(port: int) -> Callable[[Site], Found]:
    """The shape is a constant input."""

    def rule(site: Site) -> Found:
        shape = site.constant(port)
        return [None if shape is None else tuple(shape)]

    return rule


def depth_to_space(site: Site) -> Found:
    """Channels spread over blocks of pixels."""
    data, block = ranked(site.ins[0], 4, "an input"), site.option("DepthToSpaceOptions", "block_size")
    if block <= 0 or (data is not None and data[3] >= 0 and data[3] % block**2):
        raise Malformed(f"spreads {'' if data is None else data[3]} channels over blocks of {block}")
    return [None if data is None else (data[0], *(-1 if d < 0 else d * block for d in data[1:3]), data[3] // block**2)]


def space_to_depth(site: Site) -> Found:
    """Blocks of pixels gathered into channels."""
    data, block = ranked(site.ins[0], 4, "an input"), site.option("SpaceToDepthOptions", "block_size")
    if block <= 0 or (data is not None and any(d >= 0 and d % block for d in data[1:3])):
        raise Malformed(f"gathers blocks of {block} of shape {'' if data is None else listed(data)}")
    return [None if data is None else (data[0], *(-1 if d < 0 else d // block for d in data[1:3]), data[3] * block**2)]


def blocks(site: Site, sign: int) -> Found:
    """SPACE_TO_BATCH_ND (1) and BATCH_TO_SPACE_ND (-1)."""
    data, block, edges = site.ins[0], site.constant(1), site.constant(2)
    if data is None or block is None or edges is None:
        return [None]
    inner = data[1 : 1 + len(block)]
    if (
        len(inner) != len(block)
        or len(edges) != 2 * len(block)
        or min(block, default=1) <= 0
        or min(edges, default=0) < 0
    ):
        raise Malformed(f"takes blocks of {block[:8]} with edges {edges[:8]} of shape {listed(data)}")
    area = math.prod(block)
    sizes = []
    for d, b, low, high in zip(inner, block, edges[::2], edges[1::2], strict=True):
        sizes.append(-1 if d < 0 else (d + low + high) // b if sign > 0 else d * b - low - high)
        if d >= 0 and (sizes[-1] < 0 or (sign > 0 and (d + low + high) % b)):
            raise Malformed(f"takes blocks of {block[:8]} with edges {edges[:8]} of shape {listed(data)}")
    batch = -1 if data[0] < 0 else data[0] * area if sign > 0 else data[0] // area
    return [(batch, *sizes, *data[1 + len(block) :])]


def one_hot(site: Site) -> Found:
    """A new dimension of stated depth."""
    data, depth = site.ins[0], site.constant(1)
    if data is None or not depth:
        return [None]
    axis = axis_of(site.option("OneHotOptions", "axis"), len(data) + 1)
    return [(*data[:axis], depth[0], *data[axis:])]


def arg(site: Site) -> Found:
    """One dimension gone."""
    data, axis = site.ins[0], site.constant(1)
    if data is None or not axis:
        return [None]
    place = axis_of(axis[0], len(data))
    return [(*data[:place], *data[place + 1 :])]


def top_k(site: Site) -> Found:
    """The last dimension cut to a stated size."""
    data, k = site.ins[0], site.constant(1)
    return [None if not data or not k else (*data[:-1], k[0])] * 2


def sequence(port: int, dimension: int) -> Callable[[Site], Found]:
    """A recurrent layer: as many outputs a step as its recurrent weights say."""

    def rule(site: Site) -> Found:
        data = site.ins[0]
        if len(site.ins) <= port:
            raise IndexError
        weights = ranked(site.ins[port], 2, "recurrent weights")
        return [None if not data or weights is None else (*data[:-1], weights[dimension])]

    return rule


def svdf(site: Site) -> Found:
    """One output for each filter of the rank."""
    data, weights, rank = site.ins[0], ranked(site.ins[1], 2, "weights"), site.option("SVDFOptions", "rank")
    if rank <= 0 or (weights is not None and weights[0] % rank):
        raise Malformed(f"has rank {rank} and weights of shape {'' if weights is None else listed(weights)}")
    return [None if not data or weights is None else (data[0], weights[0] // rank)]
