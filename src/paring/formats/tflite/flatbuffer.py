"""Reads and writes flatbuffers by the schema table; every offset and length is checked before it is followed.

Reading is the check: one pass, with a budget on what it may unfold, so that a hostile file (offsets out of range, tables
that share children until they explode) ends in `Malformed`. Vectors of scalars are views into the file, never copies.
Writing puts parents before children and the payload of `late` vectors (weights) behind everything, so that it streams.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from paring.formats.tflite.schema import FIELDS, NAMES, SCALARS, TABLES, Field

_U16 = struct.Struct("<H")
_U32 = struct.Struct("<I")
_I32 = struct.Struct("<i")
# By kind and size: NumPy's own letters mean other sizes to struct ("<L" is 4 bytes).
_LETTERS = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q", "i1": "b", "i2": "h", "i4": "i", "i8": "q", "f4": "f"}
_STRUCTS = {name: struct.Struct("<" + _LETTERS[code[1:]]) for name, (code, _) in SCALARS.items()}

_TABLE, _VECTOR, _STRING = 350, 200, 60  # bytes that one takes in memory, measured

LIMIT = 2**31 - 1024  # a flatbuffer's own limit; payload behind it is reached by absolute offset and size


class Malformed(ValueError):
    """The bytes are no well-formed flatbuffer of this schema; the message says where it breaks."""


class Table:
    """One table: attributes are its fields, absent ones read as their default (None for str, table and vector)."""

    __slots__ = ("__dict__", "_type")

    def __init__(self, table_type: str, **fields: Any) -> None:
        """Makes a table; unknown field names raise AttributeError."""
        self._type = table_type
        for name, value in fields.items():
            if name not in FIELDS[table_type]:
                raise AttributeError(f"{table_type} has no field {name}")
            setattr(self, name, value)

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None:
            """Fields are set as they are named in the schema."""

    def __getattr__(self, name: str) -> Any:
        field = FIELDS[self._type].get(name) if not name.startswith("_") else None
        if field is None:
            raise AttributeError(f"{self._type} has no field {name}")
        if field.form != "scalar":
            return None
        return field.default if field.of == "f32" else bool(field.default) if field.of == "bool" else int(field.default)

    def __repr__(self) -> str:
        return f"{self._type}({', '.join(f'{k}={v!r}' for k, v in self.__dict__.items())})"

    @property
    def type_name(self) -> str:
        """The table's name in the schema."""
        return self._type

    def clone(self) -> Table:
        """A deep copy of tables and lists; vectors of scalars are shared, for they are never written to."""
        twin = Table(self._type)
        for name, value in self.__dict__.items():
            if isinstance(value, Table):
                value = value.clone()
            elif isinstance(value, list):
                value = [item.clone() if isinstance(item, Table) else item for item in value]
            twin.__dict__[name] = value
        return twin


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.size = min(len(data), LIMIT + 1024)
        # Bytes of memory that the tree may take. Honest files without weights take 15 for each of theirs (28
        # where all is shared), and none has more than a few MB of tables; the rest is weights, which are not copied.
        self.budget = 4 * self.size + 28 * min(self.size, 16 * 2**20) + 65536
        self.strings: dict[int, str] = {}

    def spend(self, amount: int, where: str) -> None:
        self.budget -= amount
        if self.budget < 0:
            raise Malformed(f"{where} unfolds to more than the file holds")

    def u32(self, at: int, where: str) -> int:
        if at < 0 or at + 4 > self.size:
            raise Malformed(f"{where} points outside the file")
        return int(_U32.unpack_from(self.data, at)[0])

    def follow(self, at: int, where: str) -> int:
        target = at + self.u32(at, where)
        if target == at or target + 4 > self.size:
            raise Malformed(f"{where} points outside the file")
        return target

    def length(self, at: int, size: int, where: str) -> int:
        count = self.u32(at, where)
        if at + 4 + count * size > self.size:
            raise Malformed(f"{where} has {count} elements, more than the file holds")
        return count

    def string(self, at: int, where: str) -> str:
        at = self.follow(at, where)
        if at not in self.strings:  # one copy of a string that many tables share
            count = self.length(at, 1, where)
            self.spend(_STRING + count, where)
            self.strings[at] = bytes(self.data[at + 4 : at + 4 + count]).decode("utf-8", "surrogateescape")
        return self.strings[at]

    def table(self, at: int, name: str, where: str) -> Table:
        vtable = at - int(_I32.unpack_from(self.data, at)[0])
        if vtable < 0 or vtable + 4 > self.size:
            raise Malformed(f"{where} has its field list outside the file")
        entries, inline = _U16.unpack_from(self.data, vtable)[0], _U16.unpack_from(self.data, vtable + 2)[0]
        if entries < 4 or entries % 2 or vtable + entries > self.size or inline < 4 or at + inline > self.size:
            raise Malformed(f"{where} has a broken field list")
        self.spend(_TABLE, where)
        slots = struct.unpack_from(f"<{(entries - 4) // 2}H", self.data, vtable + 4)
        fields = TABLES[name]
        known = fields[-1].slot + 1 if fields else 0
        if any(slots[known:]):
            raise Malformed(f"{where} has a field that {name} does not have in the schema known here")
        result = Table(name)
        values = result.__dict__
        for field in fields:
            offset = slots[field.slot] if field.slot < len(slots) else 0
            if not offset:
                continue
            if offset + field.inline_size > inline:
                raise Malformed(f"{where}.{field.name} lies outside its table")
            value = self.value(at + offset, field, values, f"{where}.{field.name}")
            if value is not None:
                values[field.name] = value
        return result

    def value(self, at: int, field: Field, earlier: dict[str, Any], where: str) -> Any:
        if field.form == "scalar":
            value = _STRUCTS[field.of].unpack_from(self.data, at)[0]
            return bool(value) if field.of == "bool" else value
        if field.form == "str":
            return self.string(at, where)
        if field.form == "vector of scalar":
            code, size = SCALARS[field.of]
            at = self.follow(at, where)
            count = self.length(at, size, where)
            self.spend(_VECTOR, where)
            return np.frombuffer(self.data, code, count, at + 4)
        if field.form == "table":
            return self.table(self.follow(at, where), field.of, where)
        if field.form == "union":
            member = NAMES[field.of].get(earlier.get(f"{field.name}_type", 0))
            if member is None:
                raise Malformed(f"{where} is of a kind newer than the schema known here")
            return self.table(self.follow(at, where), member, where) if member != "NONE" else None
        at = self.follow(at, where)
        count = self.length(at, 4, where)
        self.spend(_VECTOR + 8 * count, where)
        cells = range(at + 4, at + 4 + 4 * count, 4)
        if field.form == "vector of str":
            return [self.string(cell, f"{where}[{i}]") for i, cell in enumerate(cells)]
        return [self.table(self.follow(cell, where), field.of, f"{where}[{i}]") for i, cell in enumerate(cells)]


def decode(data: memoryview, root: str, identifier: bytes) -> Table:
    """Reads the root table; raises Malformed. Vectors of scalars are views into `data`."""
    if len(data) < 12 or bytes(data[4:8]) != identifier:
        raise Malformed(f"it does not carry the identifier {identifier.decode()} at byte 4")
    reader = _Reader(data)
    try:
        return reader.table(reader.follow(0, root), root, root)
    except Malformed:
        raise
    except (struct.error, ValueError) as error:
        raise Malformed(str(error)) from error


class _Writer:
    def __init__(self, late: Callable[[Table, Field], bool]) -> None:
        self.out = bytearray()
        self.vtables: dict[bytes, int] = {}
        self.shared: dict[tuple[str, bytes], int] = {}
        self.queue: deque[tuple[int, Field, Any]] = deque()
        self.late = late
        self.payload: list[tuple[int, Any]] = []

    def align(self, size: int, ahead: int = 0) -> None:
        self.out.extend(bytes(-(len(self.out) + ahead) % size))

    def table(self, table: Table) -> int:
        present = [f for f in TABLES[table.type_name] if table.__dict__.get(f.name) is not None]
        present.sort(key=lambda f: (-f.inline_size, f.slot))
        wide = bool(present) and present[0].inline_size == 8
        offset, places = (8 if wide else 4), {}
        for field in present:
            offset += -offset % field.inline_size
            places[field.slot] = offset
            offset += field.inline_size
        slots = [places.get(slot, 0) for slot in range(max(places) + 1)] if places else []
        vtable = struct.pack(f"<{len(slots) + 2}H", 4 + 2 * len(slots), offset, *slots)
        if vtable not in self.vtables:
            self.align(2)
            self.vtables[vtable] = len(self.out)
            self.out.extend(vtable)
        self.align(8 if wide else 4)
        at = len(self.out)
        self.out.extend(_I32.pack(at - self.vtables[vtable]) + bytes(offset - 4))
        for field in present:
            value, cell = table.__dict__[field.name], at + places[field.slot]
            if field.form == "scalar":
                _STRUCTS[field.of].pack_into(self.out, cell, value)
            elif self.late(table, field):
                self.payload.append((cell, value))
            else:
                self.queue.append((cell, field, value))
        return at

    def once(self, cell: int, key: tuple[str, bytes], write: Callable[[], None]) -> None:
        """Points `cell` at one shared copy of equal vectors; offsets only point forward, so a copy behind is redone."""
        if self.shared.get(key, -1) <= cell:
            self.align(4)
            write()
        self.place(cell, self.shared[key])

    def vector(self, cell: int, code: str, size: int, value: Any) -> None:
        array = np.ascontiguousarray(value, dtype=code)
        raw = array.tobytes()

        def write() -> None:
            self.align(max(4, size), ahead=4)
            self.shared[code, raw] = len(self.out)
            self.out.extend(_U32.pack(array.size) + raw)

        self.once(cell, (code, raw), write)

    def string(self, cell: int, value: str) -> None:
        raw = value.encode("utf-8", "surrogateescape")

        def write() -> None:
            self.shared["str", raw] = len(self.out)
            self.out.extend(_U32.pack(len(raw)) + raw + b"\0")

        self.once(cell, ("str", raw), write)

    def place(self, cell: int, target: int) -> None:
        _U32.pack_into(self.out, cell, target - cell)

    def drain(self) -> None:
        while self.queue:
            cell, field, value = self.queue.popleft()
            if field.form == "str":
                self.string(cell, value)
            elif field.form == "vector of scalar":
                self.vector(cell, *SCALARS[field.of], value)
            elif field.form in ("table", "union"):
                self.place(cell, self.table(value))
            else:
                self.align(4)
                at = len(self.out)
                self.out.extend(_U32.pack(len(value)) + bytes(4 * len(value)))
                self.place(cell, at)
                member = Field(field.name, 0, field.form.removeprefix("vector of "), field.of)
                self.queue.extend((at + 4 + 4 * i, member, item) for i, item in enumerate(value))


def encode(
    root: Table, identifier: bytes, out: BinaryIO, late: Callable[[Table, Field], bool], *, align: int = 16
) -> None:
    """Writes `root` to `out`; vectors of bytes for which `late(table, field)` is true go last, streamed, `align`ed.

    Raises:
      OverflowError: The whole would pass the 2 GB limit of a flatbuffer; nothing was written.
    """
    writer = _Writer(late)
    writer.out.extend(bytes(4) + identifier)
    writer.place(0, writer.table(root))
    writer.drain()
    chunks: list[tuple[bytes, Any]] = []
    position = len(writer.out)
    for cell, payload in writer.payload:
        count = memoryview(payload).nbytes
        padding = -(position + 4) % align
        writer.place(cell, position + padding)
        chunks.append((bytes(padding) + _U32.pack(count), payload))
        position += padding + 4 + count
        if position > LIMIT:
            raise OverflowError("a flatbuffer ends at 2 GB")
    out.write(writer.out)
    for head, payload in chunks:
        out.write(head)
        out.write(memoryview(payload).cast("B"))
