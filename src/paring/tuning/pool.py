"""Trials on any `concurrent.futures.Executor`: answered from the journal where it can be, and again where a worker dies.

By default each trial is a process of its own, started plainly: a pool of `multiprocessing` would import the user's script
again, which runs it again where it has no `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from typing import Any

from paring.errors import ParingError
from paring.tuning.journal import Journal
from paring.tuning.trial import Outcome, Trial, run, run_apart

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
        """Starts nothing yet.

        Args:
          journal: Where results are kept.
          executor: Runs the trials; a process for each where None.
          width: Trials under way at a time; the number of cores where None.
          progress: Called after every trial.
        """
        self.journal, self.progress = journal, progress or (lambda: None)
        self.width, self.reused = width or os.cpu_count() or 1, 0
        self._own = executor is None
        self._executor = executor or ThreadPoolExecutor(self.width)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._own:
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

    def _finished(self, trials: Sequence[Trial], numbers: Sequence[int]) -> Generator[tuple[int, Any], None, None]:
        """Each trial's result, or the error of a worker that died under it, as they come."""
        call = run_apart if self._own else run
        futures: dict[Future[dict[str, Any]], int] = {self._executor.submit(call, trials[n]): n for n in numbers}
        try:
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    number = futures.pop(future)
                    failed = future.exception()
                    if isinstance(failed, ParingError):
                        raise failed
                    yield number, future.result() if failed is None else failed
        finally:
            for future in futures:
                future.cancel()
