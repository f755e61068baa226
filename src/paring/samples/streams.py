"""Data that comes item by item: the user's functions and iterables, wrapped, replayed, spooled to disk."""

from __future__ import annotations

import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from paring.errors import InputError, ParingError
from paring.samples.feeds import Row

_END = object()


def call(function: Callable[[], Any], source: str) -> Any:
    """Calls the user's function; its own error is the cause of ours."""
    try:
        return function()
    except (Exception, SystemExit) as error:
        raise _raised(source, error) from error


def _raised(source: str, error: BaseException) -> InputError:
    got = f"{type(error).__name__}: {error}"
    return InputError(
        "the data source failed", where=source, got=got, todo="Its traceback is kept as this error's cause"
    )


class Stream:
    """Items from the user's iterable or function, its errors wrapped, the first item looked at before work begins."""

    def __init__(self, items: Iterable[Any], restart: Callable[[], Any] | None, source: str) -> None:
        """Takes what is there, and the function (if any) that made it and makes it anew for later passes."""
        self.one_shot = restart is None and isinstance(items, Iterator)
        self._restart = (lambda: call(restart, source)) if restart else (lambda: items)
        self._source = source
        self._pending: Iterator[Any] | None = self._guarded(items, source)

    def peek(self) -> Any:
        """The first item, which the next pass still begins with.

        Raises:
          InputError: There is none.
        """
        items = iter(self)
        first = next(items, _END)
        if first is _END:
            raise InputError(
                "the data has no samples",
                where=self._source,
                expected="at least one item",
                todo="Was it consumed before?",
            )
        self._pending = itertools.chain([first], items)
        return first

    def __iter__(self) -> Iterator[Any]:
        """A new pass."""
        items, self._pending = self._pending, None
        return self._guarded(self._restart(), self._source) if items is None else items

    @staticmethod
    def _guarded(items: Iterable[Any], source: str) -> Iterator[Any]:
        try:
            yield from items
        except ParingError:
            raise
        except (Exception, SystemExit) as error:
            raise _raised(source, error) from error


class Spool:
    """Samples of a source that can be read once, kept in a temporary file for the passes after the first.

    A pass that stops early is continued by the next. An error of the source comes again in every later pass.
    """

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._names: list[str] = []
        self._starts: list[int] = []
        self._labelled: list[bool] = []
        self._end = 0
        self._error: Exception | None = None
        self._file = tempfile.TemporaryFile(prefix="paring-")  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def __call__(self) -> Iterator[Row]:
        """A new pass."""
        number = 0
        while number < len(self._starts) or self._grow():
            yield self._read(number)
            number += 1

    def _grow(self) -> bool:
        if self._error:
            raise self._error
        try:
            row = next(self._rows, None)
        except Exception as error:
            self._error = error
            raise
        if row is None:
            return False
        inputs, label = row
        self._names = list(inputs)
        self._file.seek(self._end)
        for array in [*inputs.values(), *([] if label is None else [label])]:
            np.save(self._file, array, allow_pickle=False)
        self._starts.append(self._end)
        self._labelled.append(label is not None)
        self._end = self._file.tell()
        return True

    def _read(self, number: int) -> Row:
        self._file.seek(self._starts[number])
        inputs = {name: np.load(self._file, allow_pickle=False) for name in self._names}
        return inputs, np.load(self._file, allow_pickle=False) if self._labelled[number] else None
