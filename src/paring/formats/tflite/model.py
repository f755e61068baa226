"""A .tflite file in memory: the table tree, and buffers that stay in the mapped file until they are asked for."""

from __future__ import annotations

import io
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from paring.errors import InputError
from paring.formats.tflite import archive, check
from paring.formats.tflite.flatbuffer import LIMIT, Malformed, Table, decode, encode
from paring.formats.tflite.schema import ENUMS, NAMES, Field
from paring.graph import Graph

IDENTIFIER = b"TFL3"
_PAGE = mmap.PAGESIZE

DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT32": np.dtype("<f4"),
    "FLOAT16": np.dtype("<f2"),
    "FLOAT64": np.dtype("<f8"),
    "INT8": np.dtype("i1"),
    "UINT8": np.dtype("u1"),
    "INT16": np.dtype("<i2"),
    "UINT16": np.dtype("<u2"),
    "INT32": np.dtype("<i4"),
    "UINT32": np.dtype("<u4"),
    "INT64": np.dtype("<i8"),
    "UINT64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
    "COMPLEX64": np.dtype("<c8"),
    "COMPLEX128": np.dtype("<c16"),
}


class TfliteModel:
    """A parsed model. `root` is the Model table; treat it as read-only and `clone` before editing.

    Attributes:
      root: The flatbuffer's Model table.
      path: Where it was read from, for messages.
      places: Of a model that was made from another: by subgraph, where the other's tensors went.
    """

    kind = "tflite"

    def __init__(self, root: Table, data: memoryview, path: str, archive: bytes = b"") -> None:
        """Wraps an already decoded tree; use `open_model` or `parse` to read one."""
        self.root = root
        self.data = data
        self.path = path
        self.archive = archive
        self.notes: tuple[str, ...] = ()
        self.places: dict[int, dict[int, int]] = {}
        self.folder: object = None

    # -- reading -------------------------------------------------------------------------------------------------

    @classmethod
    def parse(cls, data: memoryview, path: str = "<bytes>") -> TfliteModel:
        """Decodes and checks a whole file given as bytes.

        Raises:
          InputError: The bytes are no .tflite file, or a broken one; says where it breaks.
        """
        try:
            root = decode(data, "Model", IDENTIFIER)
            model = cls(root, data, path, archive.find(data))
            _fill_absent(root)
            _inline_custom_options(model)
            check.check_model(model)
        except Malformed as error:
            raise InputError(f"cannot read {path} as a .tflite model: {error}", todo="Is the file complete?") from error
        return model

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TfliteModel:
        """Maps a file; nothing of its weights is read yet."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    raise InputError("cannot read the model", where=str(path), got="an empty file")
                view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except OSError as error:
            raise InputError("cannot read the model", where=str(path), got=error.strerror or str(error)) from error
        return cls.parse(view, str(path))

    @property
    def subgraphs(self) -> list[Table]:
        """The subgraphs; the first is the model's own."""
        return list(self.root.subgraphs or ())

    @property
    def graph(self) -> Graph:
        """The view that planning works on."""
        from paring.formats.tflite.view import view

        return view(self)

    def payload(self, buffer: Table) -> np.ndarray | None:
        """The bytes of a Buffer table, inline or behind the flatbuffer (files over 2 GB); None when it has none."""
        if buffer.offset > 1:
            return np.frombuffer(self.data, np.uint8, buffer.size, buffer.offset)
        data: np.ndarray | None = buffer.data
        return data if data is not None and data.nbytes else None

    def constant(self, tensor: Table) -> np.ndarray | None:
        """The raw bytes of a constant tensor, None for any other."""
        if tensor.is_variable or not tensor.buffer:
            return None
        return self.payload(self.root.buffers[tensor.buffer])

    def opcode(self, operator: Table) -> Table:
        """The OperatorCode of an operator."""
        code: Table = self.root.operator_codes[operator.opcode_index]
        return code

    def native(self, operator: Table) -> str:
        """LiteRT's operator name; custom operators give their own name behind `CUSTOM:`."""
        code = self.opcode(operator)
        name = NAMES["BuiltinOperator"].get(builtin_code(code), "UNKNOWN")
        return f"CUSTOM:{code.custom_code}" if name == "CUSTOM" else name

    def forget(self, values: np.ndarray) -> None:
        """Lets the system drop the mapped pages under `values` again, so that memory stays bounded by one weight."""
        source = self.data.obj
        if not isinstance(source, mmap.mmap) or not hasattr(source, "madvise") or values.nbytes < 16 * _PAGE:
            return
        base = np.frombuffer(self.data, np.uint8, 1).__array_interface__["data"][0]
        start = values.__array_interface__["data"][0] - base
        if 0 <= start < len(self.data):
            aligned = start - start % _PAGE
            source.madvise(mmap.MADV_DONTNEED, aligned, start + values.nbytes - aligned)

    # -- writing -------------------------------------------------------------------------------------------------

    def write(self, out: BinaryIO) -> None:
        """Writes the model to a fresh file; buffers are streamed, over 2 GB behind the flatbuffer, an appended ZIP last."""
        root = self.root.clone()
        payloads = [self.payload(buffer) for buffer in root.buffers or ()]
        for buffer, payload in zip(root.buffers or (), payloads, strict=True):
            buffer.__dict__.clear()
            if payload is not None:
                buffer.data = np.ascontiguousarray(payload)
        try:
            encode(root, IDENTIFIER, out, _is_payload)
        except OverflowError:
            _write_large(root, payloads, out)
        out.write(archive.moved(self.archive, out.tell()))

    def to_bytes(self) -> bytes:
        """The file as bytes."""
        out = io.BytesIO()
        self.write(out)
        return out.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file atomically: a temporary file, then a rename."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with temporary.open("wb") as out:
                self.write(out)
            os.replace(temporary, path)
        except OSError as error:
            raise InputError("cannot write the model", where=str(path), got=error.strerror or str(error)) from error
        finally:
            temporary.unlink(missing_ok=True)


def _fill_absent(root: Table) -> None:
    """Lists that a file may leave out instead of writing them empty."""
    for subgraph in root.subgraphs or ():
        subgraph.tensors, subgraph.operators = subgraph.tensors or [], subgraph.operators or []
        for table in (subgraph, *subgraph.operators):
            for name in ("inputs", "outputs"):
                if getattr(table, name) is None:
                    setattr(table, name, np.zeros(0, np.int32))


def _inline_custom_options(model: TfliteModel) -> None:
    """Options that a file over 2 GB keeps behind the flatbuffer become ordinary ones; writing decides anew."""
    for operator in (op for subgraph in model.subgraphs for op in subgraph.operators or ()):
        if operator.large_custom_options_offset > 1:
            start, size = operator.large_custom_options_offset, operator.large_custom_options_size
            if start + size > len(model.data):
                raise Malformed("custom options lie outside the file")
            operator.custom_options = np.frombuffer(model.data, np.uint8, size, start)
            del operator.large_custom_options_offset, operator.large_custom_options_size


def builtin_code(code: Table) -> int:
    """The operator of an OperatorCode; files from before 2020 carry only the deprecated one-byte field."""
    return int(max(code.builtin_code, code.deprecated_builtin_code))


def operator_code(name: str, version: int) -> Table:
    """An OperatorCode that old and new readers understand."""
    value = ENUMS["BuiltinOperator"][name]
    return Table("OperatorCode", builtin_code=value, deprecated_builtin_code=min(value, 127), version=version)


def _is_payload(table: Table, field: Field) -> bool:
    return table.type_name == "Buffer" and field.name == "data"


def _write_large(root: Table, payloads: list[np.ndarray | None], out: BinaryIO) -> None:
    """Files over 2 GB: buffers follow the flatbuffer, reached by absolute 64-bit offsets, as LiteRT reads them."""
    for buffer, payload in zip(root.buffers, payloads, strict=True):
        buffer.__dict__.clear()
        if payload is not None:
            buffer.offset, buffer.size = 1, payload.nbytes  # placeholders keep the tree's size the same
    head = io.BytesIO()
    encode(root, IDENTIFIER, head, _is_payload)
    position = head.tell()
    for buffer, payload in zip(root.buffers, payloads, strict=True):
        if payload is not None:
            position += -position % 16
            buffer.offset = position
            position += payload.nbytes
    head = io.BytesIO()
    encode(root, IDENTIFIER, head, _is_payload)
    out.write(head.getbuffer())
    position = head.tell()
    for payload in payloads:
        if payload is not None:
            padding = -position % 16
            out.write(bytes(padding))
            out.write(np.ascontiguousarray(payload).data.cast("B"))
            position += padding + payload.nbytes


__all__ = ["DTYPES", "IDENTIFIER", "LIMIT", "TfliteModel", "builtin_code", "operator_code"]
