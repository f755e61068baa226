"""Broken files: a share of `tools/fuzz.py`, and by name what the reader and the checks refuse, with their line."""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY

from paring import optimize
from paring.demo import model_path
from paring.errors import InputError, ParingError
from paring.formats.tflite.flatbuffer import Table, encode
from paring.formats.tflite.model import IDENTIFIER, TfliteModel
from paring.formats.tflite.schema import ENUMS

COUNT, SEED = 100, 20


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    place = importlib.util.spec_from_file_location("fuzz", REPOSITORY / "tools" / "fuzz.py")
    assert place is not None and place.loader is not None
    module = importlib.util.module_from_spec(place)
    sys.modules["fuzz"] = module
    place.loader.exec_module(module)
    return module


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs fork and /proc")
@pytest.mark.timeout(600)
def test_mutated_files_end_in_one_line_or_in_an_output_that_runs(fuzz: ModuleType):
    seeds = fuzz.models([str(model_path())])
    intact = fuzz.baselines(seeds)
    assert all(outcome.end == "success" and not outcome.violations for outcome in intact.values()), intact
    results = list(fuzz.fuzz(seeds, intact, SEED, range(COUNT)))
    assert not [(case.number, case.kind, case.said, o.violations) for case, o in results if o.violations]
    ends = {outcome.end for _, outcome in results}
    assert {"reader", "check", "success"} <= ends and len({case.kind for case, _ in results}) > 12


def test_a_mutation_is_the_same_every_time(fuzz: ModuleType):
    seeds = fuzz.models([str(model_path())])
    for number in range(40):
        a, b = (fuzz.mutation(seeds, SEED, number) for _ in range(2))
        assert a.data == b.data and a.said == b.said and a.data != seeds[0].data


# -- by name -------------------------------------------------------------------------------------------------------


def model() -> Table:
    return TfliteModel.open(model_path()).root.clone()


def operator(root: Table, native: str) -> Table:
    probe = TfliteModel(root, memoryview(b""), "")
    found: Table = next(op for op in root.subgraphs[0].operators if probe.native(op) == native)
    return found


def tensor(root: Table, native: str, port: int, *, out: bool = False) -> Table:
    op = operator(root, native)
    found: Table = root.subgraphs[0].tensors[int((op.outputs if out else op.inputs)[port])]
    return found


def bent(tensor: Table, dimension: int, size: int) -> None:
    tensor.shape = tensor.shape.copy()
    tensor.shape[dimension] = size
    tensor.__dict__.pop("shape_signature", None)


def weights(root: Table) -> Table:
    return tensor(root, "CONV_2D", 1)


def _dimension(root: Table) -> None:
    bent(tensor(root, "CONV_2D", 0, out=True), 1, 4096)


def _input(root: Table) -> None:
    bent(root.subgraphs[0].tensors[int(root.subgraphs[0].inputs[0])], 2, 1 << 20)


def _weights(root: Table) -> None:
    bent(weights(root), 0, 1 << 20)


def _negative(root: Table) -> None:
    bent(weights(root), 0, -7)


def _stride(root: Table) -> None:
    operator(root, "CONV_2D").builtin_options.stride_w = 0


def _padding(root: Table) -> None:
    operator(root, "CONV_2D").builtin_options.padding = 77


def _options(root: Table) -> None:
    op = operator(root, "CONV_2D")
    op.builtin_options, op.builtin_options_type = Table("AddOptions"), ENUMS["BuiltinOptions"]["AddOptions"]


def _buffer(root: Table) -> None:
    weights(root).buffer = 1 << 31


def _operand(root: Table) -> None:
    operator(root, "CONV_2D").inputs = np.array([9999, 1, 2], np.int32)


def _code(root: Table) -> None:
    operator(root, "CONV_2D").opcode_index = 200


def _twice(root: Table) -> None:
    ops = root.subgraphs[0].operators
    ops[1].outputs = ops[0].outputs


def _onto_constant(root: Table) -> None:
    op = operator(root, "CONV_2D")
    op.outputs = op.inputs[1:2]


def _order(root: Table) -> None:
    root.subgraphs[0].operators.reverse()


def _output(root: Table) -> None:
    root.subgraphs[0].outputs = np.zeros(0, np.int32)


def _kind(root: Table) -> None:
    weights(root).type = 99


def _version(root: Table) -> None:
    root.version = 7


def _nameless(root: Table) -> None:
    root.operator_codes[0].builtin_code = root.operator_codes[0].deprecated_builtin_code = 32


def _scales(root: Table) -> None:
    weights(root).quantization = Table(
        "QuantizationParameters", scale=np.ones(3, np.float32), zero_point=np.zeros(3, np.int64)
    )


def _scale(root: Table) -> None:
    weights(root).quantization = Table("QuantizationParameters", scale=np.array([np.nan], np.float32))


def _zero_point(root: Table) -> None:
    zero = np.array([-(2**63)], np.int64)
    weights(root).quantization = Table("QuantizationParameters", scale=np.ones(1, np.float32), zero_point=zero)


def _blocks(root: Table) -> None:
    kind = ENUMS["QuantizationDetails"]["BlockwiseQuantization"]
    details = Table("BlockwiseQuantization", scales=123456, block_size=32)
    weights(root).quantization = Table("QuantizationParameters", details_type=kind, details=details)


def _sparse(root: Table) -> None:
    levels = [Table("DimensionMetadata", format=0, dense_size=1 << 20) for _ in range(4)]
    weights(root).sparsity = Table(
        "SparsityParameters", traversal_order=np.arange(4, dtype=np.int32), dim_metadata=levels
    )


def _signature(root: Table) -> None:
    entry = Table("TensorMap", name="x", tensor_index=70000)
    root.signature_defs = [Table("SignatureDef", signature_key="run", inputs=[entry])]


def _metadata(root: Table) -> None:
    root.metadata = [Table("Metadata", name="labels", buffer=70000)]


def _recursion(root: Table) -> None:
    kind = ENUMS["BuiltinOptions"]["CallOnceOptions"]
    root.operator_codes.append(Table("OperatorCode", builtin_code=ENUMS["BuiltinOperator"]["CALL_ONCE"], version=1))
    call = Table("Operator", opcode_index=len(root.operator_codes) - 1, builtin_options_type=kind)
    call.builtin_options = Table("CallOnceOptions", init_subgraph_index=0)
    root.subgraphs[0].operators.append(call)


def _aliased(root: Table) -> None:
    large = max((b for b in root.buffers if b.data is not None), key=lambda b: b.data.nbytes)
    root.buffers += [large] * 20


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            _dimension,
            r"operator \d+ of subgraph 0 \(CONV_2D\) gives shape \[1, \d+, \d+, \d+\], its output says \[1, 4096,",
        ),
        (_input, r"\(CONV_2D\) gives shape"),
        (_weights, r"has \d+ bytes, its shape \[1048576, .*\] and type FLOAT32 need \d+"),
        (_negative, r"has the impossible shape \[-7, "),
        (_stride, r"\(CONV_2D\) has (stride_w 0|a stride of 0)"),
        (_padding, r"\(CONV_2D\) has the unknown padding 77"),
        (_options, r"\(CONV_2D\) needs Conv2DOptions and has AddOptions"),
        (_buffer, r"names buffer 2147483648 of \d+"),
        (_operand, r"name tensor 9999 of \d+"),
        (_code, r"names operator code 200 of \d+"),
        (_twice, r"writes tensor \d+, which is an input, a constant or made by another operator"),
        (_onto_constant, r"writes tensor \d+, which is an input, a constant"),
        (_order, r"reads tensor \d+ before anything makes it"),
        (_output, r"the model has no outputs"),
        (_kind, r"has the unknown type 99"),
        (_version, r"schema version 7, not 3"),
        (_nameless, r"a custom operator has no name"),
        (_scales, r"has 3 scales along dimension 0"),
        (_scale, r"has a scale that is negative or not finite"),
        (_zero_point, r"has a zero point out of"),
        (_blocks, r"has scales in tensor 123456 of \d+"),
        (_sparse, r"has a dense dimension of size 1048576, expected"),
        (_signature, r"signature run names tensor 70000 of \d+"),
        (_metadata, r"metadata labels names buffer 70000 of \d+"),
        (_recursion, r"subgraph 0 runs itself"),
    ],
)
def test_what_cannot_mean_a_model_is_refused_in_one_line(change: Callable[[Table], None], says: str, tmp_path: Path):
    root = model()
    change(root)
    path = tmp_path / "broken.tflite"
    path.write_bytes(TfliteModel(root, memoryview(b""), "").to_bytes())
    out = tmp_path / "out" / "out.tflite"
    out.parent.mkdir()
    with pytest.raises(InputError, match=says) as caught:
        optimize(path, output=out)
    line = str(caught.value)
    assert (
        line.startswith(f"cannot read {path} as a .tflite model") and "\n" not in line and caught.value.exit_code == 2
    )
    assert not [*out.parent.iterdir()]


def test_buffers_that_share_their_bytes_cannot_multiply_the_file():
    data = bytearray(model_path().read_bytes())
    root = TfliteModel.parse(memoryview(bytes(data))).root
    place = max((b.data for b in root.buffers if b.data is not None), key=lambda d: d.nbytes)
    start = data.find(place.tobytes()[:64])
    for buffer in root.buffers[1:]:
        buffer.__dict__.clear()
        buffer.offset, buffer.size = start, place.nbytes
    for t in root.subgraphs[0].tensors:
        t.buffer = 0
    out = io.BytesIO()
    encode(root, IDENTIFIER, out, lambda table, field: False)
    with pytest.raises(InputError, match="its buffers overlap"):
        TfliteModel.parse(memoryview(out.getvalue().ljust(len(data), b"\0")))


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", r"does not carry the identifier TFL3"),
        (b"\x10\0\0\0TFL3" + bytes(3), r"does not carry the identifier TFL3|Model"),
        (b"\xff\xff\xff\x7fTFL3" + bytes(100), r"Model points outside the file"),
        (b"\x0c\0\0\0TFL3" + bytes(4) + b"\xff\xff\xff\x7f" + bytes(64), r"Model has its field list outside the file"),
    ],
)
def test_what_is_no_flatbuffer_is_refused(data: bytes, says: str):
    with pytest.raises(InputError, match=says):
        optimize(data)


def test_tables_that_unfold_without_end_are_refused():
    """A vector of 5,000 offsets to one and the same subgraph: small on disk, endless in memory."""
    body, count = TfliteModel.open(model_path()).to_bytes(), 5000
    vector = _follow(body, _cell_of_subgraphs(body))
    table = _follow(body, vector + 4)
    start = len(body) + -len(body) % 4
    copy = start + 4 + 4 * count  # offsets point forward only, so a copy of the file goes behind the vector
    cells = [copy + table - (start + 4 + 4 * i) for i in range(count)]
    data = bytearray(body.ljust(start, b"\0") + struct.pack(f"<{count + 1}I", count, *cells) + body)
    cell = _cell_of_subgraphs(body)
    struct.pack_into("<I", data, cell, start - cell)
    with pytest.raises(InputError, match="unfolds to more than the file holds"):
        TfliteModel.parse(memoryview(bytes(data)))


def _follow(data: bytes, at: int) -> int:
    return at + int(struct.unpack_from("<I", data, at)[0])


def _cell_of_subgraphs(data: bytes) -> int:
    """Where the Model table has the offset of its subgraphs: slot 2."""
    table = _follow(data, 0)
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    return table + int(struct.unpack_from("<H", data, vtable + 8)[0])


def test_names_from_files_reach_the_terminal_as_one_printable_line():
    error = ParingError("cannot read", where="a\x1b[2J\nb\udc80" + "x" * 100_000)
    line = str(error)
    assert (
        line.isprintable() and len(line) < 2000 and line.startswith("cannot read for a\N{REPLACEMENT CHARACTER}[2J b")
    )
    line.encode()


def test_a_runtime_that_refuses_the_input_is_bad_input(tmp_path: Path):
    """Right for the reader and the checks; but no release has this version of the operator."""
    root = model()
    for code in root.operator_codes:
        code.version = 999
    path: Any = tmp_path / "newer.tflite"
    path.write_bytes(TfliteModel(root, memoryview(b""), "").to_bytes())
    with pytest.raises(InputError, match=r"the runtime does not run the input .*version '?999") as caught:
        optimize(path, output=tmp_path / "out.tflite")
    assert caught.value.exit_code == 2 and not (tmp_path / "out.tflite").exists()


@pytest.mark.parametrize("recipe", ["dynamic-int8", "int8"])
def test_a_loop_without_end_is_stopped(recipe: str, tmp_path: Path):
    """Within the time of one run, not the longer one that following a loop step by step is given."""
    from test_control_flow import accumulator, samples

    right = accumulator(41)
    root, path = right.root.clone(), tmp_path / "endless.tflite"
    bounds = [b for b in root.buffers if b.data is not None and b.data.tobytes() == (41).to_bytes(4, "little")]
    assert len(bounds) == 1
    bounds[0].data = np.frombuffer((2**31 - 1).to_bytes(4, "little"), np.uint8)
    path.write_bytes(TfliteModel(root, memoryview(b""), "").to_bytes())
    started = time.perf_counter()
    with pytest.raises(ParingError, match=r"the model does not finish: expected an answer within 1\d s") as caught:
        optimize(path, recipe, samples(right, 2) if recipe == "int8" else None, output=tmp_path / "out.tflite")
    assert caught.value.exit_code == 2 and time.perf_counter() - started < 30
    assert [p.name for p in tmp_path.iterdir()] == ["endless.tflite"]
