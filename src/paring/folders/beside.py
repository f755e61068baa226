"""Runs a written SavedModel beside the float one, signature by signature, in children: TensorFlow aborts on some models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from paring.errors import BoundError, InputError, ParingError
from paring.folders.signatures import for_wire
from paring.formats.saved_model.model import SavedModel
from paring.measure.subject import start_framework
from paring.runtime import RunError
from paring.samples import Sample
from paring.verify import Verification

MOST = 32  # samples


def beside(
    model: SavedModel, written: Path, samples: Mapping[str, Iterable[Sample]], notes: Iterable[str] = (), *, given: bool
) -> Verification:
    """What the outputs of both are on the same samples.

    Args:
      model: The float model.
      written: The folder to compare with it.
      samples: By signature, as `paring.folders.signatures.samples_of` gives them; the first 32 are taken.
      notes: On signatures that have none.
      given: False where the samples are made up.

    Raises:
      InputError: Data that the float model does not run on.
      BoundError: The float model runs and the written one does not.
    """
    result = Verification(given=given)
    signatures = model.signatures()
    if not signatures:
        result.notes.append("it has no signature, so it was not run: only Python can call it")
    result.notes += notes
    kept = {key: list(islice(found, MOST)) for key, found in samples.items()}
    expected = _outputs(model.path, kept)
    for key in [key for key, found in expected.items() if isinstance(found, str)]:
        why = expected.pop(key)
        if given:
            raise InputError("the float model does not run on the data", where=f"signature {key}", got=str(why))
        result.notes.append(f"signature {key} was not run: the float model does not run on made-up inputs ({why})")
        kept.pop(key)
    try:
        found = _outputs(written, kept, seal=True)
    except ParingError as error:
        raise BoundError(
            "TensorFlow does not load the result", where=str(model.path), got=str(error).rstrip("."), todo="Nothing was written"
        ) from error  # fmt: skip
    several = len(signatures) > 1
    for key, outputs in expected.items():
        got = found[key]
        if isinstance(got, str) or isinstance(outputs, str):
            raise BoundError(
                "TensorFlow does not run the result", where=f"signature {key}", got=str(got), todo="Nothing was written"
            )
        for name, value in outputs.items():
            _compare(f"{key}/{name}" if several else name, value, got[name], result)
    result.samples = max((len(rows) for rows in kept.values()), default=0)
    return result


def judge(found: Verification, max_error: float | None) -> None:
    """Stops the write where the result is useless.

    Raises:
      BoundError: Not-a-number where the float model has numbers, a difference beyond the bound, or a bound on what was not
        run.
    """
    if found.nan:
        raise BoundError("the result is not-a-number", where=", ".join(found.nan), todo="Nothing was written")
    for name, error in found.difference.items():
        if max_error is not None and not error <= max_error:
            raise BoundError(
                "the result differs too much", where=f"output {name}", expected=f"at most {max_error:g} (--max-error)",
                got=f"{error:.4g}", todo="Nothing was written",
            )  # fmt: skip
    if max_error is not None and found.notes:  # each says what was not run
        raise BoundError(
            "nobody knows whether the bound holds", expected=f"at most {max_error:g} (--max-error)", got=found.notes[0],
            todo="Nothing was written",
        )  # fmt: skip


def _outputs(
    folder: Path, samples: Mapping[str, list[Sample]], *, seal: bool = False
) -> dict[str, dict[str, np.ndarray] | str]:
    """By signature, each output on all samples [samples, ...], or why it does not run; in a child of its own.

    `seal` says that the folder gets its fingerprint, which the child can write now that TensorFlow is there.
    """
    found: dict[str, dict[str, np.ndarray] | str] = {}
    if not samples:
        return found
    with start_framework(folder, 0) as worker:
        worker.load("model", folder)
        if seal:
            worker.seal(folder)
        for key, given in samples.items():
            worker.enter(key, "model", key, list(given[0]), [])
            names = worker.describe(key)["outputs"]
            try:
                rows = [worker.run(key, for_wire(sample)) for sample in given]
            except RunError as error:
                found[key] = str(error).rstrip(".")
                continue
            found[key] = {name: _stacked([row[place] for row in rows]) for place, name in enumerate(names)}
    return found


def _stacked(values: list[np.ndarray]) -> np.ndarray:
    """One array of the outputs of all samples, whatever their shapes."""
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    return np.concatenate([value.reshape(-1) for value in values])


def _compare(name: str, expected: np.ndarray, got: np.ndarray, result: Verification) -> None:
    if expected.shape != got.shape or expected.dtype.kind in "SUO":
        same = expected.shape == got.shape and np.array_equal(expected, got)
        result.difference[name] = 0.0 if same else 1.0
        return
    a, b = expected.astype(np.float64), got.astype(np.float64)
    if np.isfinite(a).all() and not np.isfinite(b).all():
        result.nan.append(name)
    size = float(np.linalg.norm(a))
    gap = float(np.linalg.norm(b - a))
    result.difference[name] = gap / size if size else gap
    if expected.dtype.kind == "f" and a.ndim > 1 and a.shape[-1] > 1:
        result.agreement[name] = float((a.argmax(-1) == b.argmax(-1)).mean())


__all__ = ["beside", "judge"]
