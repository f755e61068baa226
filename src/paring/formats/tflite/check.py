"""The meaning of a decoded file: indices, sizes, strides and order, checked before anything runs it.

The flatbuffer reader has already bounded every offset and length; here a file that parses but lies is refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from paring.formats.tflite.flatbuffer import Malformed, Table
from paring.formats.tflite.operators import TABLE
from paring.formats.tflite.schema import NAMES
from paring.formats.tflite.shapes import Shape, Site, check_shapes

if TYPE_CHECKING:
    from paring.formats.tflite.model import TfliteModel

BITS = {
    "FLOAT32": 32, "FLOAT16": 16, "BFLOAT16": 16, "FLOAT64": 64, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16,
    "INT32": 32, "UINT32": 32, "INT64": 64, "UINT64": 64, "BOOL": 8, "COMPLEX64": 64, "COMPLEX128": 128,
    "INT4": 4, "UINT4": 4, "INT2": 2, "FLOAT8_E4M3FN": 8, "FLOAT8_E5M2": 8,
}  # fmt: skip
MAX_ELEMENTS = 2**40
MAX_DEPTH = 64  # of loops and branches inside each other
MAX_EMPTINESS = 4096  # values that one stored value of a sparse tensor may stand for
VERSION = 3
_ZERO_POINTS = {
    "INT8": (-128, 127), "UINT8": (0, 255), "INT16": (-32768, 32767), "UINT16": (0, 65535), "INT4": (-8, 7),
}  # fmt: skip
_OPTIONS = {
    "WHILE": "WhileOptions", "IF": "IfOptions", "CALL_ONCE": "CallOnceOptions", "FAKE_QUANT": "FakeQuantOptions",
}  # fmt: skip
_STRIDES = ("stride_w", "stride_h", "stride_d", "dilation_w_factor", "dilation_h_factor", "dilation_d_factor")
_REGIONS = (
    "then_subgraph_index", "else_subgraph_index", "cond_subgraph_index", "body_subgraph_index", "init_subgraph_index",
    "comparator_subgraph_index", "update_computation_subgraph_index", "decomposition_subgraph_index",
)  # fmt: skip


def storage_bytes(type_name: str, elements: int) -> int | None:
    """Bytes that a dense tensor takes in the file; None for strings and handles."""
    bits = BITS.get(type_name)
    return None if bits is None else (elements * bits + 7) // 8


def regions(operator: Table) -> list[int]:
    """The subgraphs that a control-flow operator runs."""
    options = [operator.builtin_options, operator.builtin_options2]
    return [getattr(o, name) for o in options if o is not None for name in _REGIONS if name in o.__dict__ or (
        name in ("then_subgraph_index", "else_subgraph_index") and o.type_name == "IfOptions"
    ) or (name in ("cond_subgraph_index", "body_subgraph_index") and o.type_name == "WhileOptions")]  # fmt: skip


def check_model(model: TfliteModel) -> None:
    """Raises Malformed where an index, a size, a stride or the order of operators is impossible."""
    root = model.root
    if root.version != VERSION:
        raise Malformed(f"it is of schema version {root.version}, not {VERSION}")
    for what in ("subgraphs", "buffers", "operator_codes"):
        if getattr(root, what) is None and not (what == "operator_codes" and root.subgraphs):
            raise Malformed(f"the model has no {what}")
    if not root.subgraphs:
        raise Malformed("the model has no subgraphs")
    if root.buffers[0].data is not None and root.buffers[0].data.nbytes:
        raise Malformed("buffer 0 must be empty")
    for index, buffer in enumerate(root.buffers):
        if buffer.offset > 1 and buffer.offset + buffer.size > len(model.data):
            raise Malformed(f"buffer {index} lies outside the file")
    if sum(data.nbytes for buffer in root.buffers if (data := model.payload(buffer)) is not None) > 2 * len(model.data):
        raise Malformed("its buffers overlap: together they are more than the file holds")
    for code in root.operator_codes or ():
        value = max(code.builtin_code, code.deprecated_builtin_code)
        if NAMES["BuiltinOperator"].get(value) == "CUSTOM" and not code.custom_code:
            raise Malformed("a custom operator has no name")
    for index, subgraph in enumerate(root.subgraphs):
        _check_subgraph(model, subgraph, f"subgraph {index}")
    if not root.subgraphs[0].outputs.size:
        raise Malformed("the model has no outputs")
    _check_control(model)
    _check_recursion(model)
    for entry in root.metadata or ():
        if entry.buffer >= len(root.buffers):
            raise Malformed(f"metadata {entry.name} names buffer {entry.buffer} of {len(root.buffers)}")
    for signature in root.signature_defs or ():
        if signature.subgraph_index >= len(root.subgraphs):
            raise Malformed(f"signature {signature.signature_key} names subgraph {signature.subgraph_index}")
        count = len(root.subgraphs[signature.subgraph_index].tensors or ())
        for entries in (signature.inputs or (), signature.outputs or ()):
            if len({entry.name for entry in entries}) < len(entries) or any(entry.name is None for entry in entries):
                raise Malformed(f"signature {signature.signature_key} has inputs or outputs without their own name")
            for entry in entries:
                if entry.tensor_index >= count:
                    raise Malformed(f"signature {signature.signature_key} names tensor {entry.tensor_index} of {count}")


def _check_subgraph(model: TfliteModel, subgraph: Table, where: str) -> None:
    tensors = subgraph.tensors
    for index, tensor in enumerate(tensors):
        _check_tensor(model, subgraph, tensor, f"tensor {index} ({tensor.name}) of {where}")
    inputs = _indices(subgraph.inputs, len(tensors), f"the inputs of {where}")
    if len(set(inputs)) < len(inputs):
        raise Malformed(f"{where} takes a tensor as two inputs")
    # What has a value before any operator runs; the last place stands for an input left out.
    known = np.zeros(len(tensors) + 1, bool)
    known[[*inputs, -1]] = True
    stored = np.zeros(len(tensors) + 1, bool)
    for index, tensor in enumerate(tensors):
        stored[index] = model.constant(tensor) is not None or tensor.external_buffer > 0
        known[index] |= stored[index] or tensor.is_variable or _empty_constant(tensor)
    if stored[inputs].any():
        raise Malformed(f"{where} takes a constant as an input")
    made = stored.copy()
    made[inputs] = True
    for number, operator in enumerate(subgraph.operators):
        _check_operator(model, subgraph, operator, known, made, f"operator {number} of {where}")
    for index in _indices(subgraph.outputs, len(tensors), f"the outputs of {where}"):
        if not known[index]:
            raise Malformed(f"output {tensors[index].name} of {where} is made by no operator")


def _empty_constant(tensor: Table) -> bool:
    return tensor.shape is not None and bool((np.asarray(tensor.shape) == 0).any())


def _check_tensor(model: TfliteModel, subgraph: Table, tensor: Table, where: str) -> None:
    type_name = NAMES["TensorType"].get(tensor.type)
    if type_name is None:
        raise Malformed(f"{where} has the unknown type {tensor.type}")
    shape = [] if tensor.shape is None else tensor.shape.tolist()
    if any(d < -1 for d in shape) or len(shape) > 16 or math.prod(max(d, 1) for d in shape) > MAX_ELEMENTS:
        raise Malformed(f"{where} has the impossible shape {shape[:16]}")
    signature = [] if tensor.shape_signature is None else tensor.shape_signature.tolist()
    if signature and (
        len(signature) != len(shape) or any(s != -1 and s != d for s, d in zip(signature, shape, strict=True))
    ):
        raise Malformed(f"{where} has shape {shape} but signature {signature}")
    if tensor.buffer >= len(model.root.buffers):
        raise Malformed(f"{where} names buffer {tensor.buffer} of {len(model.root.buffers)}")
    data = model.payload(model.root.buffers[tensor.buffer]) if tensor.buffer else None
    if data is not None and (tensor.is_variable or -1 in shape):
        raise Malformed(f"{where} is a constant and variable")
    expected = storage_bytes(type_name, math.prod(shape))
    if tensor.sparsity is not None:
        elements = None if data is None or expected is None else data.nbytes * 8 // BITS[type_name]
        _check_sparsity(tensor.sparsity, shape, elements, where)
    elif data is not None and expected is not None and data.nbytes != expected:
        raise Malformed(f"{where} has {data.nbytes} bytes, its shape {shape} and type {type_name} need {expected}")
    if tensor.quantization is not None:
        _check_quantization(tensor.quantization, shape, type_name, where)
        _check_details(model, subgraph, tensor, shape, where)


def _check_quantization(q: Table, shape: list[int], type_name: str, where: str) -> None:
    if q.scale is None or not q.scale.size:
        return
    if not np.isfinite(q.scale).all() or (q.scale < 0).any():
        raise Malformed(f"{where} has a scale that is negative or not finite")
    if q.zero_point is not None and q.zero_point.size not in (0, 1, q.scale.size):
        raise Malformed(f"{where} has {q.scale.size} scales and {q.zero_point.size} zero points")
    low, high = _ZERO_POINTS.get(type_name, (-65536, 65536))
    if q.zero_point is not None and q.zero_point.size and not low <= q.zero_point.min() <= q.zero_point.max() <= high:
        raise Malformed(f"{where} has a zero point out of [{low}, {high}]")
    if q.scale.size > 1:
        axis = q.quantized_dimension
        if not 0 <= axis < len(shape) or shape[axis] != q.scale.size:
            raise Malformed(f"{where} has {q.scale.size} scales along dimension {axis} of shape {shape}")


def _check_details(model: TfliteModel, subgraph: Table, tensor: Table, shape: list[int], where: str) -> None:
    """Quantization by blocks: its scales are a tensor of their own."""
    details = tensor.quantization.details
    if details is None or details.type_name == "CustomQuantization":
        return
    count = len(subgraph.tensors)
    if not (0 <= details.scales < count and -1 <= details.zero_points < count):
        raise Malformed(f"{where} has scales in tensor {details.scales} of {count}")
    if details.type_name != "BlockwiseQuantization":
        return
    scales = subgraph.tensors[details.scales]
    blocks = math.prod([] if scales.shape is None else scales.shape.tolist())
    if NAMES["TensorType"].get(scales.type) not in ("FLOAT16", "FLOAT32") or scales.sparsity is not None:
        raise Malformed(f"{where} has scales that are no floats")
    whole = len(shape) > 1 and blocks * details.block_size == math.prod(shape) and blocks % max(1, shape[0]) == 0
    if details.block_size <= 0 or not whole:
        raise Malformed(f"{where} of shape {shape} has {blocks} scales for blocks of {details.block_size}")


def _check_sparsity(s: Table, shape: list[int], stored: int | None, where: str) -> None:
    """Walks the levels as unpacking will, counting values, so that unpacking need not fear what it reads."""
    order = [] if s.traversal_order is None else s.traversal_order.tolist()
    blocks = [] if s.block_map is None else s.block_map.tolist()
    levels = s.dim_metadata or []
    if sorted(order) != list(range(len(shape) + len(blocks))) or len(levels) != len(order) or min(shape, default=0) < 0:
        raise Malformed(f"{where} has a sparsity description that does not fit its shape {shape}")
    if any(not 0 <= b < len(shape) for b in blocks):
        raise Malformed(f"{where} has a sparse block on a dimension it does not have")
    extents = dict(enumerate(shape))
    for position, dimension in enumerate(blocks, len(shape)):
        block = levels[order.index(position)].dense_size
        if block <= 0 or extents[dimension] % block:
            raise Malformed(f"{where} has sparse blocks of {block} in a dimension of {extents[dimension]}")
        extents[position] = block
        extents[dimension] //= block
    count = 1
    for level, dimension in zip(levels, order, strict=True):
        if level.format == 1:
            count = _check_sparse_level(level, count, extents[dimension], where)
        elif level.format != 0 or level.dense_size != extents[dimension]:
            raise Malformed(f"{where} has a dense dimension of size {level.dense_size}, expected {extents[dimension]}")
        else:
            count *= extents[dimension]
    if stored is not None and (count != stored or math.prod(shape) > MAX_EMPTINESS * (stored + 64)):
        raise Malformed(f"{where} of shape {shape} stores {stored} sparse values, its description names {count}")


def _check_sparse_level(level: Table, count: int, extent: int, where: str) -> int:
    parts = [part.values for part in (level.array_segments, level.array_indices) if part is not None]
    if len(parts) != 2 or any(part is None for part in parts):
        raise Malformed(f"{where} has a sparse dimension without segments or indices")
    segments, indices = (np.asarray(part, np.int64) for part in parts)
    if len(segments) != count + 1 or segments[0] or segments[-1] != len(indices) or (np.diff(segments) < 0).any():
        raise Malformed(f"{where} has sparse segments that do not fit its indices")
    if indices.size and (indices.min() < 0 or indices.max() >= extent):
        raise Malformed(f"{where} has a sparse index outside its dimension")
    return len(indices)


def _indices(values: np.ndarray | None, count: int, where: str, *, optional: bool = False) -> list[int]:
    found = [] if values is None else values.tolist()
    for value in found:
        if not (-1 if optional else 0) <= value < count:
            raise Malformed(f"{where} name tensor {value} of {count}")
    return found


def _check_operator(
    model: TfliteModel, subgraph: Table, operator: Table, known: np.ndarray, made: np.ndarray, where: str
) -> None:
    codes = model.root.operator_codes or []
    count = len(subgraph.tensors)
    if operator.opcode_index >= len(codes):
        raise Malformed(f"{where} names operator code {operator.opcode_index} of {len(codes)}")
    name = model.native(operator)
    if name == "UNKNOWN":
        raise Malformed(f"{where} is of a kind newer than the schema known here")
    where = f"{where} ({name})"
    for index in _indices(operator.inputs, count, f"the inputs of {where}", optional=True):
        if not known[index]:
            raise Malformed(f"{where} reads tensor {index} before anything makes it")
    for index in _indices(operator.outputs, count, f"the outputs of {where}"):
        if made[index]:
            raise Malformed(f"{where} writes tensor {index}, which is an input, a constant or made by another operator")
        known[index] = made[index] = True
    _indices(operator.intermediates, count, f"the intermediates of {where}", optional=True)
    if name in TABLE and not (operator.inputs.size and operator.inputs[0] >= 0 and operator.outputs.size):
        raise Malformed(f"{where} has no input or no output")
    options = operator.builtin_options
    for field in _STRIDES if options is not None else ():
        if field in options.__dict__ and options.__dict__[field] <= 0:
            raise Malformed(f"{where} has {field} {options.__dict__[field]}, which must be above 0")
    if options is not None and options.type_name.endswith(("Conv2DOptions", "Pool2DOptions", "Conv3DOptions")) and (
        options.stride_w <= 0 or options.stride_h <= 0
    ):  # fmt: skip
        raise Malformed(f"{where} has a stride of 0")
    if name in _OPTIONS and (options is None or options.type_name != _OPTIONS[name]):
        raise Malformed(f"{where} lacks its {_OPTIONS[name]}")
    for region in regions(operator):
        if not (name == "STABLEHLO_COMPOSITE" or 0 <= region < len(model.root.subgraphs)):
            raise Malformed(f"{where} names subgraph {region} of {len(model.root.subgraphs)}")
    try:
        check_shapes(_site(model, subgraph, operator), name)
    except Malformed as error:
        raise Malformed(f"{where} {error}") from None


def _site(model: TfliteModel, subgraph: Table, operator: Table) -> Site:
    tensors = subgraph.tensors
    ins, outs = operator.inputs.tolist(), operator.outputs.tolist()

    def shape(index: int) -> Shape | None:
        if index < 0:
            return None
        tensor = tensors[index]
        signature = tensor.shape_signature
        given = tensor.shape if signature is None or not signature.size else signature
        if given is None or not given.size:  # a scalar, or a shape that the file leaves open
            return () if model.constant(tensor) is not None else None
        return tuple(given.tolist())

    def constant(port: int) -> list[int] | None:
        index = ins[port] if port < len(ins) else -1
        raw = model.constant(tensors[index]) if index >= 0 else None
        dtype = {"INT32": "<i4", "INT64": "<i8"}.get(NAMES["TensorType"][tensors[index].type]) if index >= 0 else None
        if raw is None or dtype is None or raw.nbytes > 1024 or tensors[index].sparsity is not None:
            return None
        return [int(v) for v in raw.view(dtype)]

    return Site(tuple(shape(i) for i in ins), tuple(shape(i) for i in outs), constant, operator.builtin_options)


def _check_control(model: TfliteModel) -> None:
    """A loop or branch and the subgraphs it runs agree on what goes in and comes out."""
    for number, subgraph in enumerate(model.root.subgraphs):
        for position, operator in enumerate(subgraph.operators or ()):
            name = model.native(operator)
            if name in ("WHILE", "IF"):
                _check_regions(model, operator, name, f"operator {position} of subgraph {number} ({name})")


def _check_regions(model: TfliteModel, operator: Table, name: str, where: str) -> None:
    inner = [model.root.subgraphs[r] for r in regions(operator)]
    if len(inner) != 2:
        raise Malformed(f"{where} names {len(inner)} subgraphs, not 2")
    ins, outs = _list(operator.inputs), _list(operator.outputs)
    if -1 in ins or (name == "IF" and not ins):
        raise Malformed(f"{where} leaves out an operand")
    taken, given = ins[name == "IF" :], [_list(s.outputs) for s in inner]
    if any(len(_list(s.inputs)) != len(taken) for s in inner):
        raise Malformed(
            f"{where} has {len(taken)} operands, its subgraphs take {[len(_list(s.inputs)) for s in inner]}"
        )
    if any(len(g) != len(outs) for g in (given if name == "IF" else given[1:])) or (
        name == "WHILE" and len(outs) != len(ins)
    ):
        raise Malformed(f"{where} has {len(outs)} results, its subgraphs give {[len(g) for g in given]}")
    if name == "WHILE" and (len(given[0]) != 1 or NAMES["TensorType"][inner[0].tensors[given[0][0]].type] != "BOOL"):
        raise Malformed(f"{where} has a condition that does not give one boolean")


def _list(values: np.ndarray | None) -> list[int]:
    return [] if values is None else [int(v) for v in values]


def _check_recursion(model: TfliteModel) -> None:
    """LiteRT has no recursion; a subgraph that runs itself would never end."""
    calls = [
        {r for op in subgraph.operators or () for r in regions(op) if 0 <= r < len(model.root.subgraphs)}
        for subgraph in model.root.subgraphs
    ]
    done: set[int] = set()

    def visit(index: int, path: tuple[int, ...]) -> None:
        if index in path:
            raise Malformed(f"subgraph {index} runs itself")
        if len(path) > MAX_DEPTH:
            raise Malformed(f"subgraphs run each other more than {MAX_DEPTH} deep")
        if index not in done:
            for target in calls[index]:
                visit(target, (*path, index))
            done.add(index)

    for index in range(len(calls)):
        visit(index, ())
