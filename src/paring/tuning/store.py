"""Samples in a file that every process of a search reads: written once, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paring.runtime.wire import receive, send
from paring.samples import Samples


@dataclass
class SampleFile:
    """A file of samples under construction; `finish` writes what readers need beside it.

    Attributes:
      path: The file.
      names: Input names, in the order of each sample's arrays.
      rows: Rows of each sample so far.
    """

    path: Path
    names: Sequence[str]
    rows: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._file = self.path.open("wb")

    def add(self, sample: list[np.ndarray]) -> None:
        """Appends one sample."""
        send(self._file, {}, sample)
        self.rows.append(next((len(array) for array in sample if array.ndim), 1))

    def finish(self, labels: np.ndarray | None) -> None:
        """Closes the file; `labels` are those of its rows, or of its samples."""
        self.close()
        side = _beside(self.path, "labels.npy")
        side.unlink(missing_ok=True)  # those of an earlier run
        if labels is not None:
            np.save(side, labels)
        facts = {"names": list(self.names), "rows": self.rows}
        _beside(self.path, "json").write_text(json.dumps(facts), encoding="utf-8")

    def close(self) -> None:
        """Closes the file as it is."""
        self._file.close()


def stored(path: Path, limit: int | None = None) -> Samples:
    """The samples of a finished file, the first `limit` of them, with their labels."""
    facts = json.loads(_beside(path, "json").read_text(encoding="utf-8"))
    rows = facts["rows"][:limit]
    side = _beside(path, "labels.npy")

    def read() -> Iterator[tuple[dict[str, np.ndarray], None]]:
        with path.open("rb") as file:
            for _ in rows:
                yield dict(zip(facts["names"], receive(file)[1], strict=True)), None

    labels = first(np.load(side, allow_pickle=False), path, limit) if side.exists() else None
    return Samples(path.name, read, count=len(rows), labels=labels)


def first(values: np.ndarray, path: Path, limit: int | None) -> np.ndarray:
    """What belongs to the first `limit` samples of a file: values are one for each row, or one for each sample."""
    rows = json.loads(_beside(path, "json").read_text(encoding="utf-8"))["rows"]
    return values[: sum(rows[:limit]) if len(values) == sum(rows) else limit]


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f"{path.name}.{ending}")
