"""The LiteRT schema as data: which fields each table has, in which slot, of which type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType

SCALARS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "bool": ("<u1", 1),
        "i8": ("<i1", 1),
        "u8": ("<u1", 1),
        "i16": ("<i2", 2),
        "u16": ("<u2", 2),
        "i32": ("<i4", 4),
        "u32": ("<u4", 4),
        "f32": ("<f4", 4),
        "i64": ("<i8", 8),
        "u64": ("<u8", 8),
    }
)


@dataclass(frozen=True)
class Field:
    """One field: `form` is scalar, str, table, union, or a vector of scalar, str or table; `of` names the element."""

    name: str
    slot: int
    form: str
    of: str
    default: float = 0

    @property
    def inline_size(self) -> int:
        """Bytes the field takes inside its table."""
        return SCALARS[self.of][1] if self.form == "scalar" else 4


def _field(text: str, slot: int) -> Field:
    name, _, kind = text.partition(":")
    kind, _, default = kind.partition("=")
    if kind.startswith("union:"):
        return Field(name, slot, "union", kind[6:])
    vector = kind.startswith("[")
    of = kind.strip("[]")
    form = "scalar" if of in SCALARS else "str" if of == "str" else "table"
    return Field(name, slot, f"vector of {form}" if vector else form, of, float(default) if default else 0)


def _load() -> tuple[dict[str, tuple[Field, ...]], dict[str, dict[str, int]]]:
    text = resources.files(__package__).joinpath("schema.txt").read_text(encoding="utf-8")
    tables: dict[str, tuple[Field, ...]] = {}
    enums: dict[str, dict[str, int]] = {}
    in_enums = False
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        if line == "enums":
            in_enums = True
            continue
        name, *parts = line.split()
        if in_enums:
            enums[name] = {key: int(value) for key, value in (part.split("=") for part in parts)}
        else:
            tables[name] = tuple(_field(part, slot) for slot, part in enumerate(parts) if part != "_")
    return tables, enums


_tables, _enums = _load()
TABLES: Mapping[str, tuple[Field, ...]] = MappingProxyType(_tables)
ENUMS: Mapping[str, Mapping[str, int]] = MappingProxyType(_enums)
NAMES: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {name: {value: key for key, value in members.items()} for name, members in _enums.items()}
)
FIELDS: Mapping[str, Mapping[str, Field]] = MappingProxyType(
    {table: {field.name: field for field in fields} for table, fields in _tables.items()}
)
