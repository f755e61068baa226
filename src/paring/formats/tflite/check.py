"""The meaning of a decoded file: indices, sizes, strides and order, checked before anything runs it.

The flatbuffer reader has already bounded every offset and length; here a file that parses but lies is refused.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from paring.formats.tflite.flatbuffer import Malformed, Table
from paring.formats.tflite.schema import NAMES

if TYPE_CHECKING:
    from paring.formats.tflite.model import TfliteModel

BITS = {
    "FLOAT32": 32, "FLOAT16": 16, "BFLOAT16": 16, "FLOAT64": 64, "INT8": 8, "UINT8": 8, "INT16": 16, "UINT16": 16,
    "INT32": 32, "UINT32": 32, "INT64": 64, "UINT64": 64, "BOOL": 8, "COMPLEX64": 64, "COMPLEX128": 128,
    "INT4": 4, "UINT4": 4, "INT2": 2, "FLOAT8_E4M3FN": 8, "FLOAT8_E5M2": 8,
}  # fmt: skip
MAX_ELEMENTS = 2**40
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
    for index, subgraph in enumerate(root.subgraphs):
        _check_subgraph(model, subgraph, f"subgraph {index}")
    _check_control(model)
    _check_recursion(model)
    for entry in root.metadata or ():
        if entry.buffer >= len(root.buffers):
            raise Malformed(f"metadata {entry.name} names buffer {entry.buffer} of {len(root.buffers)}")
    for signature in root.signature_defs or ():
        if signature.subgraph_index >= len(root.subgraphs):
            raise Malformed(f"signature {signature.signature_key} names subgraph {signature.subgraph_index}")
        count = len(root.subgraphs[signature.subgraph_index].tensors or ())
        for entry in (*(signature.inputs or ()), *(signature.outputs or ())):
            if entry.tensor_index >= count:
                raise Malformed(f"signature {signature.signature_key} names tensor {entry.tensor_index} of {count}")


def _check_subgraph(model: TfliteModel, subgraph: Table, where: str) -> None:
    tensors = subgraph.tensors or []
    for index, tensor in enumerate(tensors):
        _check_tensor(model, tensor, f"tensor {index} ({tensor.name}) of {where}")
    known = np.zeros(len(tensors) + 1, bool)
    for index in _indices(subgraph.inputs, len(tensors), f"the inputs of {where}"):
        known[index] = True
    known[-1] = True
    for index, tensor in enumerate(tensors):
        known[index] |= tensor.is_variable or bool(tensor.buffer) or tensor.external_buffer > 0
    for number, operator in enumerate(subgraph.operators or ()):
        _check_operator(model, operator, len(tensors), known, f"operator {number} of {where}")
    for index in _indices(subgraph.outputs, len(tensors), f"the outputs of {where}"):
        if not known[index] and not _empty_constant(tensors[index]):
            raise Malformed(f"output {tensors[index].name} of {where} is made by no operator")


def _empty_constant(tensor: Table) -> bool:
    return tensor.shape is not None and bool((np.asarray(tensor.shape) == 0).any())


def _check_tensor(model: TfliteModel, tensor: Table, where: str) -> None:
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
    if tensor.sparsity is None:
        expected = storage_bytes(type_name, math.prod(shape))
        if data is not None and expected is not None and data.nbytes != expected:
            raise Malformed(f"{where} has {data.nbytes} bytes, its shape {shape} and type {type_name} need {expected}")
    else:
        _check_sparsity(tensor.sparsity, shape, where)
    if tensor.quantization is not None:
        _check_quantization(tensor.quantization, shape, where)


def _check_quantization(q: Table, shape: list[int], where: str) -> None:
    if q.scale is None or not q.scale.size:
        return
    if not np.isfinite(q.scale).all() or (q.scale < 0).any():
        raise Malformed(f"{where} has a scale that is negative or not finite")
    if q.zero_point is not None and q.zero_point.size not in (0, 1, q.scale.size):
        raise Malformed(f"{where} has {q.scale.size} scales and {q.zero_point.size} zero points")
    if q.zero_point is not None and q.zero_point.size and np.abs(q.zero_point).max() > 65536:
        raise Malformed(f"{where} has a zero point out of range")
    if q.scale.size > 1:
        axis = q.quantized_dimension
        if not 0 <= axis < len(shape) or shape[axis] != q.scale.size:
            raise Malformed(f"{where} has {q.scale.size} scales along dimension {axis} of shape {shape}")


def _check_sparsity(s: Table, shape: list[int], where: str) -> None:
    order = [] if s.traversal_order is None else s.traversal_order.tolist()
    blocks = [] if s.block_map is None else s.block_map.tolist()
    levels = s.dim_metadata or []
    if sorted(order) != list(range(len(shape) + len(blocks))) or len(levels) != len(order):
        raise Malformed(f"{where} has a sparsity description that does not fit its shape {shape}")
    if any(not 0 <= b < len(shape) for b in blocks):
        raise Malformed(f"{where} has a sparse block on a dimension it does not have")
    for level in levels:
        if level.format == 1:
            if level.array_segments is None or level.array_indices is None:
                raise Malformed(f"{where} has a sparse dimension without segments or indices")
        elif level.dense_size <= 0:
            raise Malformed(f"{where} has a dense dimension of size {level.dense_size}")


def _indices(values: np.ndarray | None, count: int, where: str, *, optional: bool = False) -> list[int]:
    found = [] if values is None else values.tolist()
    for value in found:
        if not (-1 if optional else 0) <= value < count:
            raise Malformed(f"{where} name tensor {value} of {count}")
    return found


def _check_operator(model: TfliteModel, operator: Table, count: int, known: np.ndarray, where: str) -> None:
    codes = model.root.operator_codes or []
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
        known[index] = True
    _indices(operator.intermediates, count, f"the intermediates of {where}", optional=True)
    options = operator.builtin_options
    for field in _STRIDES if options is not None else ():
        if field in options.__dict__ and options.__dict__[field] <= 0:
            raise Malformed(f"{where} has {field} {options.__dict__[field]}, which must be above 0")
    if options is not None and options.type_name.endswith(("Conv2DOptions", "Pool2DOptions", "Conv3DOptions")) and (
        options.stride_w <= 0 or options.stride_h <= 0
    ):  # fmt: skip
        raise Malformed(f"{where} has a stride of 0")
    for region in regions(operator):
        if not (name == "STABLEHLO_COMPOSITE" or 0 <= region < len(model.root.subgraphs)):
            raise Malformed(f"{where} names subgraph {region} of {len(model.root.subgraphs)}")


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
    if -1 in ins or name == "IF" and not ins:
        raise Malformed(f"{where} leaves out an operand")
    taken, given = ins[name == "IF" :], [_list(s.outputs) for s in inner]
    if any(len(_list(s.inputs)) != len(taken) for s in inner):
        raise Malformed(f"{where} has {len(taken)} operands, its subgraphs take {[len(_list(s.inputs)) for s in inner]}")
    if any(len(g) != len(outs) for g in (given if name == "IF" else given[1:])) or name == "WHILE" and len(outs) != len(ins):
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
        if index not in done:
            for target in calls[index]:
                visit(target, (*path, index))
            done.add(index)

    for index in range(len(calls)):
        visit(index, ())
