"""Samples for the signatures of a SavedModel: the user's, or made-up ones, text included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from paring.errors import InputError
from paring.formats.saved_model.model import Port, SavedModel
from paring.samples import Sample, Samples, TensorSpec, open_samples, seeded

MADE_UP = 4
_WORDS = np.array([b"a", b"b", b"0", b"the"])


def samples_of(
    model: SavedModel, data: Any, *, labels: Any = None, limit: int | None = None, image_range: Any = None
) -> tuple[dict[str, Iterable[Sample]], list[str]]:
    """By signature what to run it on, to be read again and again, and notes on those that cannot be run.

    Args:
      model: Whose signatures.
      data: Samples; with several signatures `.npz` keys read `signature/input`. None: made-up ones.
      labels: As in `open_samples`.
      limit: At most so many samples.
      image_range: For a folder of images.

    Raises:
      InputError: Data that does not fit.
    """
    found: dict[str, Iterable[Sample]] = {}
    notes = []
    signatures = model.signatures()
    for key, (inputs, _) in signatures.items():
        specs = _specs(inputs)
        if specs is None:
            notes.append(f"signature {key} was not run: an input has no known rank")
        elif not inputs:
            found[key] = [{}]
        elif data is None:
            found[key] = list(_made_up(specs, MADE_UP))
        else:
            found[key] = _given(data, specs, key, [*signatures], labels, limit, image_range)
    return found, notes


def for_wire(sample: Sample) -> list[np.ndarray]:
    """A sample as it is sent to the child: in its own order, text as bytes."""
    return [np.char.encode(value) if value.dtype.kind == "U" else value for value in sample.values()]


def _specs(inputs: list[Port]) -> dict[str, TensorSpec] | None:
    if any(port.shape is None for port in inputs):
        return None
    return {port.name: TensorSpec(port.name, port.shape or (), port.dtype) for port in inputs}


def _given(
    data: Any,
    specs: Mapping[str, TensorSpec],
    key: str,
    signatures: list[str],
    labels: Any,
    limit: int | None,
    image_range: Any,
) -> Samples:
    """The user's samples for one signature."""
    several = len(signatures) > 1
    try:
        name = key if several else None
        return open_samples(data, specs, labels=labels, limit=limit, image_range=image_range, signature_name=name)
    except InputError as error:
        if not several:
            raise
        expected = f"keys `signature/input` for each of {', '.join(signatures)}"
        raise InputError(
            "the data does not fit", where=f"signature {key}", expected=expected, got=str(error).rstrip(".")
        ) from error


def _made_up(specs: Mapping[str, TensorSpec], count: int) -> Iterator[Sample]:
    """Seeded samples; text is a word."""
    numbers = {name: spec for name, spec in specs.items() if spec.dtype != "string"}
    drawn = iter(seeded(numbers, count)) if numbers else iter([{}] * count)
    for index, sample in enumerate(drawn):
        random = np.random.default_rng([1, index])
        texts = {
            name: random.choice(_WORDS, [max(d, 1) for d in spec.shape])
            for name, spec in specs.items()
            if name not in numbers
        }
        yield {**sample, **texts}


__all__ = ["MADE_UP", "for_wire", "samples_of"]
