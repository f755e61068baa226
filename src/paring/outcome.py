"""What is said of an optimized model, as plain data: the terminal, JSON and pages are made from it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from paring.verify import Verification

VERSION = "0.1.0"  # goes into what is written


class Clock:
    """Seconds of the steps of a run, by name.

    Attributes:
      seconds: What each step took; one that comes again adds up.
    """

    def __init__(self) -> None:
        """Starts the first step."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """A step ends, and the next begins."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@dataclass(frozen=True)
class Row:
    """One operator of the input, with what it got or why it got nothing.

    Attributes:
      name: Of the operator.
      native: LiteRT's name of it.
      kind: The canonical one.
      mode: How it was quantized, see `paring.decision.Decision`.
      form: Of its weights and activations.
      reason: Why.
      weight_bytes: Of its weights before.
      scope: The loop or branch that it is in.
      sparsity: Share of its weights that pruning left zero; None where it was not pruned.
      pattern: Of the zeros.
      lost: Relative output error that they add on the data, None without data.
      pruning: Why this pattern, or why it was not pruned; empty where nobody asked.
      stages: What its weights got before quantization, in words and in order.
    """

    name: str
    native: str
    kind: str
    mode: str
    form: str
    reason: str
    weight_bytes: int
    scope: str
    sparsity: float | None = None
    pattern: str = ""
    lost: float | None = None
    pruning: str = ""
    stages: tuple[str, ...] = ()

    @property
    def became(self) -> str:
        """All that it got, in order, in words."""
        last = self.mode if self.form == "float" else f"{self.mode} {self.form.removeprefix('dynamic-')}"
        return ", ".join((*self.stages, last))


@dataclass(frozen=True)
class Culprit:
    """A tensor whose range leaves most of its channels without levels.

    Attributes:
      tensor: Its name.
      low: Smallest value seen.
      high: Largest.
      channel_db: Signal to quantization noise of the median channel, in dB.
      operators: The operators around it, by name: what to exempt.
    """

    tensor: str
    low: float
    high: float
    channel_db: float
    operators: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What was done to a model, what it cost, and what running it showed.

    `kind` is `tflite` or `SavedModel`; `runtime` the oldest LiteRT that runs it, or whose operators it has.
    """

    source: str
    output: str
    recipe: str
    source_bytes: int
    output_bytes: int
    rows: tuple[Row, ...]
    culprits: tuple[Culprit, ...]
    verification: Verification | None
    runtime: str | None
    samples: int
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()
    kind: str = "tflite"

    @property
    def ratio(self) -> float:
        """Output size over input size."""
        return self.output_bytes / max(1, self.source_bytes)
