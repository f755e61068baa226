"""Trials on any `concurrent.futures.Executor`: answered from the journal where it can be, and again where a worker dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from typing import Any

from paring.errors import ParingError
from paring.tuning.journal import Journal
from paring.tuning.trial import Outcome, Trial, run

TRIES = 3  # of a trial whose worker died under it


class Pool:
    """Runs trials; use it as a context manager.

    Attributes:
      width: How many trials are worth having under way at a time.
      reused: How many results came from the journal.
    """

    def __init__(
        self,
        journal: Journal,
        executor: Executor | None = None,
        *,
        width: int | None = None,
        progress: Callable[[], None] | None = None,
    ) -> None:
        """Starts no process yet.

        Args:
          journal: Where results are kept.
          executor: Runs the trials; processes of its own where None.
          width: Trials under way at a time; the number of cores where None.
          progress: Called after every trial.
        """
        self.journal, self.progress = journal, progress or (lambda: None)
        self.width, self.reused = width or os.cpu_count() or 1, 0
        self._own = executor is None
        self._executor = executor

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._own and self._executor is not None:
            self._executor.shutdown(wait=kind is None, cancel_futures=True)

    def run(self, trials: Sequence[Trial]) -> list[Outcome]:
        """The outcome of each trial, in order.

        Raises:
          ParingError: A trial's worker died `TRIES` times, or the metric failed.
        """
        found: dict[int, Outcome] = {}
        for number, trial in enumerate(trials):
            known = self.journal.get(trial.request())
            if known is not None:
                found[number], self.reused = Outcome(**known), self.reused + 1
                self.progress()
        tries = dict.fromkeys(set(range(len(trials))) - found.keys(), 0)
        while tries:
            with contextlib.closing(self._finished(trials, sorted(tries))) as finished:
                for number, result in finished:
                    if isinstance(result, BaseException):
                        tries[number] += 1
                        if tries[number] >= TRIES:
                            raise ParingError(
                                "a trial's worker died", where=f"recipe {trials[number].recipe}",
                                got=f"{type(result).__name__}: {result}", todo="Is there enough memory?",
                            ) from result  # fmt: skip
                        continue
                    self.journal.put(trials[number].request(), result)
                    found[number] = Outcome(**result)
                    del tries[number]
                    self.progress()
        return [found[number] for number in range(len(trials))]

    def _finished(self, trials: Sequence[Trial], numbers: Sequence[int]) -> Generator[tuple[int, Any]]:
        """Each trial's result, or the error of a worker that died under it, as they come."""
        futures: dict[Future[dict[str, Any]], int] = {}
        try:
            for number in numbers:
                try:
                    futures[self._started().submit(run, trials[number])] = number
                except BrokenExecutor as error:
                    self._executor = None if self._own else self._executor
                    yield number, error
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    number = futures.pop(future)
                    failed = future.exception()
                    if isinstance(failed, ParingError):
                        raise failed
                    if isinstance(failed, BrokenExecutor) and self._own:
                        self._executor = None
                    yield number, future.result() if failed is None else failed
        finally:
            for future in futures:
                future.cancel()

    def _started(self) -> Executor:
        if self._executor is None:
            with _one_thread():
                self._executor = ProcessPoolExecutor(self.width, multiprocessing.get_context("spawn"))
                list(self._executor.map(abs, range(self.width)))  # processes begin with the first work
        return self._executor


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Processes that start now do their arithmetic with one thread each: there is one of them for each core."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
