"""Arrays and items matched to a model's inputs: names, shapes, dtypes, batches, finite values."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from paring.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from paring.samples import TensorSpec

# One sample, and its labels [rows, ...] where the source has any.
Row: TypeAlias = tuple[dict[str, np.ndarray], "np.ndarray | None"]


def by_name(signature: Mapping[str, TensorSpec] | Sequence[TensorSpec]) -> dict[str, TensorSpec]:
    """The specs under the names that samples get."""
    specs = dict(signature) if isinstance(signature, Mapping) else {spec.name: spec for spec in signature}
    if not specs or len(specs) != len(signature):
        raise InputError("bad signature", expected="inputs with different names", got=str([*specs]))
    return specs


def numpy_dtype(spec: TensorSpec) -> np.dtype:
    """The NumPy type of an input; text is `U`."""
    try:
        return np.dtype("U" if spec.dtype in ("string", "str") else spec.dtype)
    except TypeError as error:
        raise UnsupportedError(
            "cannot feed the input",
            where=spec.name,
            expected="a NumPy dtype",
            got=spec.dtype,
            todo="Give paring a model with a float32 or integer input",
        ) from error


def is_array(data: Any) -> bool:
    """True for arrays and tensors of any framework, not for lists or scalars."""
    return isinstance(data, np.ndarray) or (hasattr(data, "__array__") and not isinstance(data, np.generic))


def to_array(value: Any, where: str) -> np.ndarray:
    """A NumPy array of numbers, text or bools."""
    try:
        array = value if isinstance(value, np.ndarray) else np.asarray(value)
    except Exception as error:
        raise InputError("not an array", where=where, got=f"{type(value).__name__} ({error})") from error
    if array.dtype.kind not in "biufcUSV" or (array.dtype.kind == "V" and array.dtype.fields):
        raise InputError(
            "not an array of numbers",
            where=where,
            got=f"{type(value).__name__} of dtype {array.dtype}",
            todo="Give each sample one rectangular array per input",
        )
    return array


def wrong_name(where: str, name: str, right: list[str]) -> InputError:
    """The error for an input name that the model lacks; suggests the nearest."""
    near = difflib.get_close_matches(name, right, 1, 0.5)
    return InputError(
        "wrong input name",
        where=where,
        expected=", ".join(right),
        got=name,
        todo=f"Did you mean {near[0]}?" if near else "Use the model's input names",
    )


def named(inputs: Mapping[str, Any], right: list[str], where: str) -> dict[str, Any]:
    """The inputs under the model's names; `x` also serves for a tensor named `serving_default_x:0`."""
    short = {re.sub(r"^serving_default_|:\d+$", "", name): name for name in right}
    unknown = [str(name) for name in inputs if name not in right and short.get(name, name) not in right]
    if unknown:
        raise wrong_name(where, unknown[0], right)
    found = {name if name in right else short[name]: value for name, value in inputs.items()}
    absent = [name for name in right if name not in found]
    if absent:
        raise InputError(
            "inputs are missing",
            where=where,
            expected=", ".join(right),
            got=", ".join(found) or "none",
            todo=f"Add {', '.join(absent)}",
        )
    return found


def pick(
    arrays: Mapping[str, np.ndarray], right: list[str], source: str, signature_name: str | None
) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Finds the model's inputs, and `labels`, among named arrays; the only array of all serves the only input."""
    found = dict(arrays)
    if signature_name is not None:
        prefix = f"{signature_name}/"
        mine = {name.removeprefix(prefix): array for name, array in found.items() if name.startswith(prefix)}
        rest = {name: array for name, array in found.items() if "/" not in name or name in right}
        found = rest | mine
    if not found:
        raise InputError("the data has no samples", where=source, expected=", ".join(right), got="no array")
    labels = None if "labels" in right else found.pop("labels", None)
    if len(found) == len(right) == 1:
        return {right[0]: next(iter(found.values()))}, labels
    if set(found) == {""}:
        raise InputError(
            "inputs are missing",
            where=source,
            expected=f"one array for each of {', '.join(right)}",
            got="one array",
            todo="Give a .npz or a dict by name",
        )
    return named(found, right, source), labels


@dataclass(frozen=True)
class Layout:
    """How an array holds samples.

    Attributes:
      spec: The input.
      stacked: Each entry along axis 0 is a whole input; otherwise a row of a batch.
      count: Whole samples in it.
      total: What labels are counted against: entries along axis 0.
      rows: Entries per sample.
    """

    spec: TensorSpec
    stacked: bool
    count: int
    total: int
    rows: int

    def sample(self, array: np.ndarray, index: int, source: str) -> np.ndarray:
        """Sample `index` with the input's full shape and dtype."""
        part = array[index] if self.stacked else array[index * self.rows : (index + 1) * self.rows]
        return cast(part, self.spec, f"{source}, input {self.spec.name}, sample {index}")

    def notes(self, name: str) -> tuple[str, ...]:
        """What the cutting left over."""
        tail = self.total - self.count * self.rows
        return (tail_note(name, tail, self.total, self.rows),) if tail else ()


def tail_note(name: str, tail: int, total: int, batch: int) -> str:
    """Says that the last rows do not fill a batch."""
    return f"input {name}: the last {tail} of {total} rows do not fill a batch of {batch} and are left out"


def layout(array: np.ndarray, spec: TensorSpec, source: str) -> Layout:
    """How `array` serves `spec`; raises where its shape or dtype cannot."""
    where = f"{source}, input {spec.name}"
    check_dtype(array.dtype, spec, where)
    stacked = array.ndim == len(spec.shape) + 1
    fits = stacked and _fits(array.shape[1:], spec.shape)
    fits = fits or (0 < array.ndim == len(spec.shape) and _fits(array.shape[1:], spec.shape[1:]))
    if not fits:
        shape = ["N", *("any" if dim < 0 else dim for dim in spec.shape[1:])]
        expected = f"[{', '.join(map(str, shape))}] with N samples"
        raise _shape_error(where, expected, array, spec)
    rows = 1 if stacked else spec.batch
    return Layout(spec, stacked, array.shape[0] // rows, array.shape[0], rows)


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size == want or (want < 0 < size) for size, want in zip(shape, wanted, strict=True)
    )


def _shape_error(where: str, expected: str, array: np.ndarray, spec: TensorSpec) -> InputError:
    inner = [int(dim) for dim in spec.shape[1:]]
    todo = "Bring the data into that shape"
    if inner and min(inner) > 0 and array.size and array.size % int(np.prod(inner)) == 0:
        todo = f"If the values are in order, use x.reshape({', '.join(map(str, [-1, *inner]))})"
    return InputError("wrong shape", where=where, expected=expected, got=str(list(array.shape)), todo=todo)


def check_dtype(dtype: np.dtype, spec: TensorSpec, where: str) -> None:
    """Raises where values of `dtype` cannot mean what the input means."""
    wanted = numpy_dtype(spec)
    given, want = dtype.kind, wanted.kind
    if want == "f":
        right, todo = given in "fiub", "Use x.astype('float32')"
    elif want in "iu":
        right = given in "iub" and (wanted.itemsize > 1 or dtype.itemsize > 1 or given == want)
        todo = f"Cast it if the values are whole numbers: x.astype('{spec.dtype}')"
        if wanted.itemsize == 1 and given == "f":
            todo = "The input is quantized: give its integers, round(x / scale) + zero_point"
        elif wanted.itemsize == 1:
            todo = "Shift pixels first: x.astype('int16') - 128" if want == "i" else "Shift it: x.astype('int16') + 128"
    elif want == "b":
        right, todo = given == "b", "Use x.astype(bool)"
    elif want == "c":
        right, todo = given in "cf", "Use x.astype('complex64')"
    else:
        right, todo = given in "US", "Give text"
    if not right:
        raise InputError("wrong dtype", where=where, expected=spec.dtype, got=str(dtype), todo=todo)


def cast(array: np.ndarray, spec: TensorSpec, where: str) -> np.ndarray:
    """A copy in the input's dtype; raises on values that it cannot hold, and on NaN and infinity."""
    check_dtype(array.dtype, spec, where)
    wanted = numpy_dtype(spec)
    if wanted.kind in "US":
        return np.array(array)
    if wanted.kind in "iu" and array.size and array.dtype.kind in "iu":
        info, low, high = np.iinfo(wanted), int(array.min()), int(array.max())
        if low < info.min or high > info.max:
            expected = f"{spec.dtype} values in [{info.min}, {info.max}]"
            raise InputError("values out of range", where=where, expected=expected, got=f"{low} to {high}")
    with np.errstate(over="ignore", invalid="ignore"):
        result = np.array(array, wanted, order="C")
    if wanted.kind in "fc" and not np.isfinite(result).all():
        bad = int(np.size(result) - np.count_nonzero(np.isfinite(result)))
        got = f"{bad} NaN or infinite of {result.size}"
        raise InputError(
            "bad values", where=where, expected="finite numbers", got=got, todo="Clean or leave out the sample"
        )
    return result


def split(item: Any, specs: Mapping[str, TensorSpec], where: str) -> Iterator[Row]:
    """Turns one item of a stream into samples: an item may be one row, one batch, or several of the model's batches.

    Args:
      item: `inputs` or `(inputs, label)`; inputs as array, dict by name, or tuple in order.
      specs: The model's inputs.
      where: What errors call the item.
    """
    inputs, label = _unpack(item, specs, where)
    arrays: dict[str, np.ndarray] = {}
    parts: dict[str, int] = {}
    for name, spec in specs.items():
        array = to_array(inputs[name], f"{where}, input {name}")
        single = array.ndim == len(spec.shape) - 1 and spec.batch == 1
        array = array[None] if single else array
        fixed = bool(spec.shape) and spec.shape[0] > 0 and array.ndim == len(spec.shape)
        times, tail = divmod(array.shape[0], spec.shape[0]) if fixed else (1, 0)
        if tail or not times or not _fits(array.shape[fixed:], spec.shape[fixed:]):
            expected = f"[{', '.join('any' if dim < 0 else str(dim) for dim in spec.shape)}]"
            raise _shape_error(f"{where}, input {name}", expected, array, spec)
        arrays[name], parts[name] = array, times
    times = max(parts.values())
    if any(part not in (1, times) or (part != times and specs[name].shape) for name, part in parts.items()):
        got = ", ".join(f"{name}: {part}" for name, part in parts.items())
        raise InputError("inputs differ in number", where=where, expected="as many batches of each", got=got)
    rows = next((array.shape[0] for array in arrays.values() if array.ndim), 1)
    labels = None if label is None else _label_rows(to_array(label, f"{where}, label"), rows, times, where)
    for index in range(times):
        sample = {}
        for name, array in arrays.items():
            size = array.shape[0] // times if array.ndim else 0
            part = array[index * size : (index + 1) * size] if parts[name] > 1 else array
            sample[name] = cast(part, specs[name], f"{where}, input {name}")
        yield (
            sample,
            None if labels is None else labels[index * len(labels) // times : (index + 1) * len(labels) // times],
        )


def _unpack(item: Any, specs: Mapping[str, TensorSpec], where: str) -> tuple[dict[str, Any], Any]:
    names, label = list(specs), None
    inputs = item
    if isinstance(item, tuple) and len(item) == 2 and (len(names) == 1 or isinstance(item[0], (Mapping, tuple, list))):
        inputs, label = item
    if isinstance(inputs, Mapping):
        return named(inputs, names, where), label
    if isinstance(inputs, tuple) or (isinstance(inputs, list) and len(names) > 1):
        if len(inputs) != len(names):
            expected = f"{len(names)} inputs ({', '.join(names)}), or (inputs, label)"
            raise InputError("wrong number of inputs", where=where, expected=expected, got=f"a tuple of {len(inputs)}")
        return dict(zip(names, inputs, strict=True)), label
    if len(names) > 1:
        raise InputError(
            "inputs are missing", where=where, expected=f"a dict or tuple of {', '.join(names)}", got="one array"
        )
    return {names[0]: inputs}, label


def _label_rows(label: np.ndarray, rows: int, times: int, where: str) -> np.ndarray:
    if label.ndim and label.shape[0] == rows:
        return label
    if times == 1:
        return label[None]
    got = str(list(label.shape))
    raise InputError("labels do not match", where=where, expected=f"{rows} labels for {rows} rows", got=got)
