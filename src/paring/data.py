"""Brings a model's entries and the user's data together: samples in the order of a subgraph's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paring.errors import InputError
from paring.formats.tflite.constants import shape_of, type_name
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.view import entries
from paring.samples import Samples, TensorSpec, open_samples, seeded


@dataclass(frozen=True)
class Feed:
    """Samples for one entry (signature) of a model.

    Attributes:
      subgraph: The subgraph they enter.
      names: Input names in the subgraph's input order.
      samples: What the user gave, or seeded samples.
      outputs: Output names in the subgraph's output order.
      given: False where the samples were made up.
      signature: Its name, empty for a model without any.
    """

    subgraph: int
    names: tuple[str, ...]
    samples: Samples
    outputs: tuple[str, ...]
    given: bool = True
    signature: str = ""

    def __iter__(self) -> Iterator[list[np.ndarray]]:
        for sample in self.samples:
            yield [sample[name] for name in self.names]

    def head(self, count: int) -> list[list[np.ndarray]]:
        """The first `count` samples."""
        found = []
        for sample in self:
            found.append(sample)
            if len(found) >= count:
                break
        return found


def specs(model: TfliteModel, subgraph: int, inputs: Mapping[str, int]) -> dict[str, TensorSpec]:
    """What each input of an entry takes, in the subgraph's input order."""
    graph = model.subgraphs[subgraph]
    names = {index: name for name, index in inputs.items()}
    found = {}
    for index in (int(i) for i in graph.inputs):
        tensor = graph.tensors[index]
        signature = tensor.shape_signature
        shape = shape_of(tensor) if signature is None or not signature.size else tuple(int(d) for d in signature)
        name = names.get(index, tensor.name or f"tensor{index}")
        found[name] = TensorSpec(name, shape, type_name(tensor))
    return found


def feeds(
    model: TfliteModel, data: Any, *, labels: Any = None, image_range: Any = None, limit: int | None = None
) -> list[Feed]:
    """One Feed per entry; `data` None gives seeded samples."""
    if data is None and image_range is not None:
        raise InputError("image range is of no use", expected="a folder of images (--data)")
    found, seen = [], set()
    all_entries = entries(model)
    for key, (subgraph, inputs, outputs) in all_entries.items():
        if subgraph in seen:
            continue
        seen.add(subgraph)
        wanted = specs(model, subgraph, inputs)
        if data is None:
            samples = seeded(wanted, 4)
        else:
            samples = open_samples(
                data, wanted, labels=labels, image_range=image_range, limit=limit,
                signature_name=key if len(all_entries) > 1 else None,
            )  # fmt: skip
        names = {index: name for name, index in outputs.items()}
        order = tuple(names.get(int(i), f"output{n}") for n, i in enumerate(model.subgraphs[subgraph].outputs))
        found.append(Feed(subgraph, tuple(wanted), samples, order, data is not None, key))
    return found
