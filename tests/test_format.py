"""The file format: what is read is what was written, by our reader and the official one; odd but right files pass."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as official
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paring.demo import model_path
from paring.errors import InputError
from paring.formats import load
from paring.formats.tflite import flatbuffer
from paring.formats.tflite.flatbuffer import Table, decode, encode
from paring.formats.tflite.model import IDENTIFIER, TfliteModel
from paring.formats.tflite.schema import ENUMS, NAMES, SCALARS, TABLES, Field
from paring.runtime import Worker

# -- random trees --------------------------------------------------------------------------------------------------

SIZES = {"bool": (0, 1), "f32": (0, 0)} | {
    name: (int(np.iinfo(code).min), int(np.iinfo(code).max)) for name, (code, _) in SCALARS.items() if name[0] in "iu"
}


def scalar(of: str) -> st.SearchStrategy[Any]:
    if of == "f32":
        return st.floats(width=32)
    return st.booleans() if of == "bool" else st.integers(*SIZES[of])


def vector(of: str) -> st.SearchStrategy[np.ndarray]:
    return st.lists(scalar(of), max_size=5).map(lambda values: np.array(values, SCALARS[of][0]))


@st.composite
def tables(draw: st.DrawFn, name: str, depth: int = 0) -> Table:
    """Any table of the schema: a few of its fields, nested tables in three of four."""
    table = Table(name)
    fields = TABLES[name]
    chosen = draw(st.sets(st.integers(0, len(fields) - 1), max_size=5)) if fields else ()
    types = {f"{field.name}_type" for field in fields if field.form == "union"}
    for index in sorted(chosen):
        field = fields[index]
        if field.name in types or (depth > 5 and field.form not in ("scalar", "vector of scalar", "str")):
            continue
        if field.form == "union":
            kind = draw(st.sampled_from([v for v in NAMES[field.of] if v]))
            setattr(table, f"{field.name}_type", kind)
            value = draw(tables(NAMES[field.of][kind], depth + 1))
        elif field.form == "table":
            value = draw(tables(field.of, depth + 1))
        elif field.form == "vector of table":
            value = draw(st.lists(tables(field.of, depth + 1), max_size=3))
        elif field.form == "vector of str":
            value = draw(st.lists(st.text(max_size=6), max_size=3))
        elif field.form == "str":
            value = draw(st.text(max_size=8))
        else:
            value = draw(vector(field.of) if field.form == "vector of scalar" else scalar(field.of))
        setattr(table, field.name, value)
    return table


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Table):
        return (
            isinstance(b, Table)
            and a.type_name == b.type_name
            and a.__dict__.keys() == b.__dict__.keys()
            and all(same(a.__dict__[name], b.__dict__[name]) for name in a.__dict__)
        )
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (np.ndarray, float)):
        return np.array_equal(np.asarray(a, np.asarray(b).dtype), b, equal_nan=np.asarray(b).dtype.kind == "f")
    return bool(a == b)


def written(root: Table, late: bool = True) -> bytes:
    out = io.BytesIO()
    encode(root, IDENTIFIER, out, lambda table, field: late and table.type_name == "Buffer" and field.name == "data")
    return out.getvalue()


def camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def agrees(table: Table, theirs: Any) -> bool:
    """True where the official reader's object has the same values, defaults included."""
    by_name = {key.lower(): value for key, value in vars(theirs).items()}
    for field in TABLES[table.type_name]:
        ours, got = getattr(table, field.name), by_name[camel(field.name).lower()]
        if not _agree(field, ours, got):
            return False
    return True


def _agree(field: Field, ours: Any, got: Any) -> bool:
    if field.form == "scalar":
        return bool(got == ours) or (ours != ours and got != got)
    if ours is None or (field.form == "union" and got is None):
        return got is None or (field.form.startswith("vector") and not len(got))
    if field.form in ("table", "union"):
        return type(got).__name__ == f"{ours.type_name}T" and agrees(ours, got)
    if field.form == "str":
        return bool(got == ours.encode())
    if field.form == "vector of scalar":
        return np.array_equal(ours, got, equal_nan=field.of == "f32") if len(ours) else not len(got)
    if field.form == "vector of str":
        return [text.encode() for text in ours] == got
    return len(ours) == len(got) and all(map(agrees, ours, got))


RANDOM = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@RANDOM
@given(tables("Model"), st.booleans())
def test_a_tree_is_read_as_it_was_written(root: Table, late: bool):
    assert same(root, decode(memoryview(written(root, late)), "Model", IDENTIFIER))


@RANDOM
@given(st.sampled_from(sorted(TABLES)).flatmap(tables))
def test_every_table_is_read_as_it_was_written(root: Table):
    assert same(root, decode(memoryview(written(root)), root.type_name, IDENTIFIER))


@RANDOM
@given(tables("Model"))
def test_the_official_reader_reads_the_same_values(root: Table):
    data = written(root)
    theirs = official.ModelT.InitFromObj(official.Model.GetRootAs(data, 0))
    assert agrees(decode(memoryview(data), "Model", IDENTIFIER), theirs)


def test_the_official_reader_agrees_on_real_models(shared: Path):
    for path in [model_path(), *(shared / "models").glob("*.tflite")]:
        data = TfliteModel.open(path).to_bytes()
        theirs = official.ModelT.InitFromObj(official.Model.GetRootAs(data, 0))
        assert agrees(decode(memoryview(data), "Model", IDENTIFIER), theirs), path


# -- the schema ----------------------------------------------------------------------------------------------------

KINDS = {
    "Int8": "i8", "Uint8": "u8", "Bool": "bool", "Int16": "i16", "Uint16": "u16", "Int32": "i32", "Uint32": "u32",
    "Int64": "i64", "Uint64": "u64", "Float32": "f32",
}  # fmt: skip


def snake(name: str) -> str:
    return re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", name)).lower()


def official_field(name: str, add: re.Match[str], source: str) -> Field:
    """A field as the wheel's generated reader has it."""
    field, kind, slot, default = add.group(1), add.group(2), int(add.group(3)), add.group(4)
    if kind != "UOffsetTRelative":
        value = {"False": 0.0, "True": 1.0, "None": 0.0}.get(default)
        return Field(snake(field), slot, "scalar", KINDS[kind], float(default) if value is None else value)
    body = re.search(rf"^    def {field}\(self(, j)?\):\n(.*?)(?=^    # |^def |\Z)", source, re.M | re.S)
    assert body, (name, field)
    many, code = "vector of " if body.group(1) else "", body.group(2)
    flags = re.search(r"number_types\.(\w+)Flags, a", code)
    made = re.search(r"(?:obj|x) = (\w+)\(\)", code)
    if "String(" in code:
        return Field(snake(field), slot, f"{many}str", "str")
    if many and flags:
        return Field(snake(field), slot, "vector of scalar", KINDS[flags.group(1)])
    if "_tab.Union" in code:
        return Field(snake(field), slot, "union", "")
    assert made, (name, field)
    return Field(snake(field), slot, f"{many}table", made.group(1))


def test_the_schema_is_that_of_the_runtime():
    source = Path(official.__file__).read_text(encoding="utf-8")
    enums, found = {}, {}
    for chunk in re.split(r"^class ", source, flags=re.M)[1:]:
        name = re.match(r"\w+", chunk).group()  # type: ignore[union-attr]
        if "def Init(self, buf, pos)" in chunk:
            pattern = rf"^def {name}Add(\w+)\(builder, \w+\):\n    builder\.Prepend(\w+)Slot\((\d+), .*, ([^,)\n]*)\)$"
            fields = [official_field(name, add, chunk) for add in re.finditer(pattern, chunk, re.M)]
            found[name] = {field.slot: field for field in fields}
        elif "__slots__" not in chunk and not hasattr(getattr(official, name), "InitFromObj"):
            enums[name] = {k: v for k, v in vars(getattr(official, name)).items() if isinstance(v, int) and k[0] != "_"}
    assert set(found) == set(TABLES)
    for name, fields in found.items():
        ours = {
            f.slot: Field(f.name, f.slot, f.form, "" if f.form == "union" else f.of, f.default) for f in TABLES[name]
        }
        # Names only to the letter: acronyms split in more than one way.
        assert {s: _plain(f) for s, f in ours.items()} == {s: _plain(f) for s, f in fields.items()}, name
    for name, members in ENUMS.items():
        assert dict(members) == enums[name], name
    unions = {f.of for fields in TABLES.values() for f in fields if f.form == "union"}
    assert {name for name in enums if f"def {name}Creator(" in source} == unions
    for union in unions:
        assert {name for name in ENUMS[union] if name != "NONE"} <= set(TABLES)


def _plain(field: Field) -> tuple[Any, ...]:
    return (field.name.replace("_", ""), field.slot, field.form, field.of, np.float32(field.default))


# -- files over 2 GB -----------------------------------------------------------------------------------------------


def outputs(path: Path) -> list[np.ndarray]:
    with Worker() as worker:
        worker.load("m", path)
        return worker.run("m", [np.linspace(0, 1, 1024, dtype=np.float32).reshape(1, 32, 32, 1)])


def test_weights_behind_the_flatbuffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The form that files over 2 GB take, on a small file: the limit is lowered to what the tables need."""
    model = TfliteModel.open(model_path())
    with monkeypatch.context() as patch:
        patch.setattr(flatbuffer, "LIMIT", 100_000)
        model.save(tmp_path / "large.tflite")
        again = TfliteModel.open(tmp_path / "large.tflite")
    offsets = [b.offset for b in again.root.buffers if b.offset > 1]
    assert (
        offsets
        and all(offset % 16 == 0 for offset in offsets)
        and not any(b.data is not None for b in again.root.buffers)
    )
    assert same_payloads(model, again)
    for a, b in zip(outputs(model_path()), outputs(tmp_path / "large.tflite"), strict=True):
        np.testing.assert_array_equal(a, b)
    assert TfliteModel.parse(memoryview(again.to_bytes())).to_bytes() == model.to_bytes()


def same_payloads(a: TfliteModel, b: TfliteModel) -> bool:
    pairs = zip(a.root.buffers, b.root.buffers, strict=True)
    return all(np.array_equal(x, y) for x, y in ((a.payload(m), b.payload(n)) for m, n in pairs) if x is not None)


def test_a_sparse_file_of_three_gigabytes(tmp_path: Path):
    """The weights lie behind 3 GB of nothing, which takes neither disk nor memory."""
    model = TfliteModel.open(model_path())
    root, path = model.root.clone(), tmp_path / "huge.tflite"
    payloads = [model.payload(buffer) for buffer in model.root.buffers]
    at = 3 << 30
    with path.open("wb") as file:
        for buffer, payload in zip(root.buffers, payloads, strict=True):
            buffer.__dict__.clear()
            if payload is not None:
                buffer.offset, buffer.size = at, payload.nbytes
                file.seek(at)
                file.write(payload.tobytes())
                at += payload.nbytes + -payload.nbytes % 16
        file.seek(0)
        file.write(written(root))
    assert path.stat().st_size > 3 << 30 and path.stat().st_blocks * 512 < 8 << 20
    again = TfliteModel.open(path)
    assert same_payloads(model, again)
    assert again.to_bytes() == model.to_bytes()  # small enough for an ordinary file now
    broken = again.root.clone()
    broken.buffers[-1].offset = at + (1 << 40)
    broken.buffers[-1].size = 1 << 20
    with pytest.raises(InputError, match=r"buffer \d+ lies outside the file"):
        TfliteModel.parse(memoryview(written(broken)))


def test_custom_options_behind_the_flatbuffer_become_ordinary_ones():
    model = custom(np.zeros(0, np.uint8))
    operator = model.root.subgraphs[0].operators[0]
    operator.custom_options = None
    operator.large_custom_options_offset, operator.large_custom_options_size = 1 << 20, 5
    data = written(model.root)
    again = TfliteModel.parse(memoryview(data.ljust(1 << 20, b"\0") + b"hello"))
    assert again.root.subgraphs[0].operators[0].custom_options.tobytes() == b"hello"
    assert (
        TfliteModel.parse(memoryview(again.to_bytes())).root.subgraphs[0].operators[0].custom_options.tobytes()
        == b"hello"
    )
    with pytest.raises(InputError, match="custom options lie outside the file"):
        TfliteModel.parse(memoryview(data))


# -- odd but right -------------------------------------------------------------------------------------------------


def custom(options: np.ndarray, shape: tuple[int, ...] = (1, 2), kind: str = "FLOAT32", name: str = "x") -> TfliteModel:
    """One custom operator between two tensors of the same name."""
    tensors = [
        Table("Tensor", name=name, shape=np.array(shape, np.int32), type=ENUMS["TensorType"][kind]) for _ in "io"
    ]
    code = Table("OperatorCode", deprecated_builtin_code=32, builtin_code=32, custom_code="Mine", version=2)
    operator = Table("Operator", opcode_index=0, custom_options=options)
    operator.inputs, operator.outputs = np.array([0], np.int32), np.array([1], np.int32)
    graph = Table("SubGraph", tensors=tensors, operators=[operator], inputs=operator.inputs, outputs=operator.outputs)
    root = Table("Model", version=3, subgraphs=[graph], operator_codes=[code], buffers=[Table("Buffer")])
    return TfliteModel(root, memoryview(b""), "<test>")


def reread(model: TfliteModel) -> TfliteModel:
    return TfliteModel.parse(memoryview(model.to_bytes()))


def test_custom_operators_keep_their_options():
    options = np.arange(40, dtype=np.uint8)
    again = reread(custom(options))
    operator = again.root.subgraphs[0].operators[0]
    assert again.native(operator) == "CUSTOM:Mine" and again.opcode(operator).version == 2
    np.testing.assert_array_equal(operator.custom_options, options)


def test_tensors_may_share_a_name():
    again = reread(custom(np.zeros(0, np.uint8), name="the same"))
    assert [t.name for t in again.root.subgraphs[0].tensors] == ["the same"] * 2
    # Many tables that share one long string are no bomb: it is read once.
    many = custom(np.zeros(0, np.uint8), name="n" * 500)
    many.root.subgraphs[0].tensors += [many.root.subgraphs[0].tensors[0].clone() for _ in range(2000)]
    assert len(reread(many).root.subgraphs[0].tensors) == 2002


@pytest.mark.parametrize("kind", ["FLOAT32", "STRING", "INT4", "RESOURCE"])
@pytest.mark.parametrize("shape", [(0, 2), (1,), ()])
def test_tensors_without_elements_and_of_every_kind(kind: str, shape: tuple[int, ...]):
    tensor = reread(custom(np.zeros(0, np.uint8), shape, kind)).root.subgraphs[0].tensors[0]
    assert NAMES["TensorType"][tensor.type] == kind and (tensor.shape is None or tuple(tensor.shape) == shape)


def test_constant_text_is_kept():
    text = b"\2\0\0\0\x10\0\0\0\x13\0\0\0\x16\0\0\0catdog"
    model = custom(np.zeros(0, np.uint8), (2,), "STRING")
    tensor = Table("Tensor", name="labels", shape=np.array([2], np.int32), type=ENUMS["TensorType"]["STRING"], buffer=1)
    model.root.subgraphs[0].tensors.append(tensor)
    model.root.buffers.append(Table("Buffer", data=np.frombuffer(text, np.uint8)))
    again = reread(model)
    raw = again.constant(again.root.subgraphs[0].tensors[2])
    assert raw is not None and raw.tobytes() == text


def test_files_from_before_2020_name_operators_in_one_byte():
    model = TfliteModel.open(model_path())
    root = model.root.clone()
    for code in root.operator_codes:
        code.deprecated_builtin_code = max(code.deprecated_builtin_code, code.builtin_code)
        code.__dict__.pop("builtin_code", None)
    old = TfliteModel.parse(memoryview(TfliteModel(root, model.data, model.path).to_bytes()))
    natives = [[m.native(op) for op in m.root.subgraphs[0].operators] for m in (model, old)]
    assert natives[0] == natives[1] and "CONV_2D" in natives[0]


def test_metadata_is_kept():
    model = TfliteModel.open(model_path())
    root = model.root.clone()
    root.metadata = [*(root.metadata or ()), Table("Metadata", name="mine", buffer=len(root.buffers))]
    root.buffers.append(Table("Buffer", data=np.frombuffer(b"anything", np.uint8)))
    again = reread(TfliteModel(root, model.data, model.path))
    entry = next(e for e in again.root.metadata if e.name == "mine")
    raw = again.payload(again.root.buffers[entry.buffer])
    assert raw is not None and raw.tobytes() == b"anything"


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_a_zip_behind_the_flatbuffer_is_kept(tmp_path: Path, how: str):
    from paring import optimize

    path, out = tmp_path / "labelled.tflite", tmp_path / "out.tflite"
    path.write_bytes(model_path().read_bytes())
    files = {"labels.txt": b"cat\ndog\n", "bomb": bytes(50 << 20)}
    if how == "absolute":  # as the metadata writer does
        _zip(path, "a", files)
    else:
        _zip(tmp_path / "own.zip", "w", files)
        path.write_bytes(path.read_bytes() + (tmp_path / "own.zip").read_bytes())
    optimize(path, output=out, verified=False)
    assert out.stat().st_size < path.stat().st_size  # the 50 MB of zeros stayed packed
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
        assert archive.read("labels.txt") == files["labels.txt"] and archive.namelist() == [*files]
        first = archive.infolist()[0].header_offset
    assert out.read_bytes()[first : first + 4] == b"PK\3\4"
    assert TfliteModel.open(out).archive == TfliteModel.open(path).archive
    assert zipfile.is_zipfile(io.BytesIO(TfliteModel.open(out).to_bytes()))


def _zip(path: Path, mode: Any, files: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, mode, zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def test_an_unchanged_model_is_written_to_the_same_tree(shared: Path):
    for path in [model_path(), *(shared / "models").glob("*.tflite")]:
        model = load(path)
        once = model.to_bytes()
        assert TfliteModel.parse(memoryview(once)).to_bytes() == once, path
