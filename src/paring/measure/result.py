"""What measuring gives: plain data that goes into results.json and that every report is made from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Histogram:
    """Counts of values in equal bins.

    Attributes:
      low: Left edge of the first bin.
      high: Right edge of the last.
      counts: One count per bin.
      scale: Step of the quantization grid drawn in, None where there is none.
      range: What the grid can hold, as real numbers, None without a grid.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    scale: float | None = None
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Error:
    """How far a tensor lies from its float counterpart, over all samples.

    Attributes:
      snr_db: Power of the float values over the power of the difference, in dB.
      channel_db: The same for the median channel (last dimension), which one loud channel cannot hide.
      mse: Mean square difference over the square of the grid's scale (1/12 is pure rounding); None without a grid.
      cosine: Cosine of the angle between both.
      clipped: Share of the float values that lie outside of what the grid can hold; None without a grid.
    """

    snr_db: float
    channel_db: float
    cosine: float
    mse: float | None = None
    clipped: float | None = None


@dataclass(frozen=True)
class Layer:
    """One layer of the float model beside what became of it.

    Attributes:
      name: Operator name in the float model.
      native: LiteRT's name of the operator there.
      optimized: Operator name in the optimized model; empty where it has no counterpart.
      matched: How the counterpart was found: `structure`, `name`, `weights`, `position`; empty without one.
      form: What it became: e.g. `int8`, `int8 x int4`, `float32`.
      shape: Of its result, -1 where dynamic.
      inputs: Indices of the layers it reads from.
      own: Error of the optimized layer alone, fed with the float input.
      accumulated: Error of its result inside the whole optimized model.
      blame: What the layer itself adds, as signal over noise in dB: the optimized layer against the float layer, both
        fed with the same values on the grids of the inputs, so that a bad grid is charged to the layer that made the
        value. Of all values or of the median channel, whichever is worse; of a softmax all values. The ranking goes by
        this, the smallest first.
      activation: Histogram of the float result.
      weights: Histogram of the float weights.
      weight_db: Signal to noise of the stored weights, in dB.
      rule: Index into the recipe's rules, None where no recipe is known or none applied.
      note: What to know of it (why it has no counterpart, ...).
      shared: What its stored weights have in common: zeros, few values per channel; empty where nothing.
    """

    name: str
    native: str
    optimized: str = ""
    matched: str = ""
    form: str = ""
    shape: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    own: Error | None = None
    accumulated: Error | None = None
    blame: float | None = None
    activation: Histogram | None = None
    weights: Histogram | None = None
    weight_db: float | None = None
    rule: int | None = None
    note: str = ""
    shared: str = ""

    @property
    def became(self) -> str:
        """The form, behind what the weights share."""
        return ", ".join(filter(None, (self.shared, self.form)))


@dataclass(frozen=True)
class Comparison:
    """What `paring.compare` gives.

    Attributes:
      source: Path of the float model.
      optimized: Path of the optimized one.
      samples: Samples compared on.
      given: False where the samples were made up.
      layers: In topological order of the float model. Inputs that the optimized model stores on a grid come first, as
        layers with the native name `INPUT`.
      ranking: Indices of the layers that have a `blame`, the worst first.
      outputs: Accumulated error by output name.
      agreement: By output name, the share of samples with the same largest value.
      recipe: The recipe in the optimized file's metadata, None where it has none.
      exempt: Recipe lines (YAML) that exempt the culprits.
      unmatched: Operators of the optimized model without a counterpart, by name.
      notes: What to know of the whole.
      culprits: Indices of the layers that stand clearly below the rest, the worst first; their `note` says why.
    """

    source: str
    optimized: str
    samples: int
    given: bool
    layers: tuple[Layer, ...]
    ranking: tuple[int, ...]
    outputs: dict[str, Error] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    recipe: dict[str, Any] | None = None
    exempt: str = ""
    unmatched: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    culprits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """One model that tuning measured.

    Attributes:
      label: What it is, in a few words.
      bytes: Size of the file.
      score: Value of the metric.
      drop: How much worse than the float model, in the metric's own unit; negative where it is better.
      latency_ms: Median latency with one thread, None where it was not asked for.
      recipe: The recipe that makes it.
      pareto: No other candidate is both smaller and better.
      chosen: This one was written.
      seconds: What making and measuring it took.
    """

    label: str
    bytes: int
    score: float
    drop: float
    recipe: dict[str, Any]
    latency_ms: float | None = None
    pareto: bool = False
    chosen: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class Sensitivity:
    """What one scheme on one layer alone does to the output.

    Attributes:
      layer: Operator name.
      native: LiteRT's name of it.
      scheme: e.g. `int4`.
      db: Signal to noise of the model's output, in dB, with only this layer changed.
      bytes: Bytes of the layer's weights under the scheme.
    """

    layer: str
    native: str
    scheme: str
    db: float
    bytes: int


@dataclass(frozen=True)
class Tuning:
    """What `paring.tune` gives.

    Attributes:
      source: Path of the float model.
      metric: Name of the metric.
      limits: What was asked: `max_drop`, `max_size`, `max_latency`, those that were.
      before: The float model as a candidate.
      candidates: All that were measured, in that order.
      sensitivity: The sweep before the search.
      samples: Samples calibrated on, and samples measured on.
      seconds: Wall time.
      reused: How many measurements came from an earlier, interrupted run.
      notes: What to know.
    """

    source: str
    metric: str
    limits: dict[str, float]
    before: Candidate
    candidates: tuple[Candidate, ...]
    sensitivity: tuple[Sensitivity, ...] = ()
    samples: tuple[int, int] = (0, 0)
    seconds: float = 0.0
    reused: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A value, and what it is times the first model's.

    Attributes:
      value: None where it could not be measured.
      ratio: 1 for the first model itself and for equal values; None where the first model's is 0 or missing.
    """

    value: float | None
    ratio: float | None = None


@dataclass(frozen=True)
class Timing:
    """Latency of one model with a number of threads.

    Attributes:
      threads: How many.
      median_ms: Median of all rounds, wall time of one call in milliseconds.
      spread_ms: Interquartile range of the same.
      cpu_ms: Median CPU time of one call, over all threads.
      ratio: Median over the launches of the median over a launch's rounds of this model's time divided by the first
        model's in the same round; CPU time for one thread, else wall time.
      error: Half the width of the ratio's 95% interval, from how launches differ; None after a single launch.
      launches: Times that the model was started anew.
      rounds: Rounds over all launches.
      calls: Calls in one round of the last launch.
    """

    threads: int
    median_ms: float
    spread_ms: float
    cpu_ms: float
    ratio: float
    error: float | None
    launches: int
    rounds: int
    calls: int


@dataclass(frozen=True)
class BenchModel:
    """What `paring bench` measured of one model.

    Attributes:
      path: As it was given.
      kind: `tflite`, `SavedModel` or `Keras`.
      bytes: Size of the file, or of all files of a folder.
      zip: The same in a ZIP archive, deflate level 9.
      zstd: The same after zstd, level 9.
      memory: Most bytes of a fresh process that loaded the model and ran one sample with one thread, libraries included.
      added: Bytes of that which came with the model, beyond what the process had before it.
      latency: With one thread, then with more.
      score: By the metric.
      drop: How much worse than the first model, in the metric's unit; negative where it is better.
      drop_error: Standard error of that over the samples; None where the metric has no value for each sample.
      paths: By runtime path (`xnnpack`, `builtin`, `TensorFlow`, ...) how many operators of each kind ran there;
        `unseen` are operators in loops, branches and dead ends, of which the runtime does not say.
      notes: What to know of this model.
    """

    path: str
    kind: str
    bytes: Figure
    zip: Figure
    zstd: Figure
    memory: Figure
    added: float | None
    latency: tuple[Timing, ...]
    score: Figure
    drop: float
    drop_error: float | None
    paths: dict[str, dict[str, int]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """What `paring.bench` gives.

    Attributes:
      environment: Machine and versions.
      metric: Name of the metric.
      unit: Of the score and of drops.
      higher_is_better: Which way is better.
      against: What outputs were scored against: `labels`, or `the first model`.
      samples: Rows that were scored.
      given: False where the samples were made up.
      models: In the order given; all ratios are to the first.
      notes: What to know of the whole.
    """

    environment: dict[str, Any]
    metric: str
    unit: str
    higher_is_better: bool
    against: str
    samples: int
    given: bool
    models: tuple[BenchModel, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AlgorithmRun:
    """One algorithm trained with one seed.

    Attributes:
      seed: Of weights and of the order of the data.
      score: Share of test samples whose class is right, of the written file where there is one.
      change: Points over the float twin of the same seed.
      bytes: Of the file; None where none was written.
      zstd: After zstd, level 9.
      zeros: Share of zeros among the weights in the file.
      distinct: Most different values in one channel of a weight in the file.
    """

    seed: int
    score: float
    change: float
    bytes: int | None
    zstd: int | None
    zeros: float | None
    distinct: int | None


@dataclass(frozen=True)
class AlgorithmRow:
    """One algorithm on one model and data set, over all seeds.

    Attributes:
      label: As it was asked for.
      apply: Its stages, as a recipe says them; empty for the float twin.
      score: Mean share of right classes.
      score_sd: Standard deviation over the seeds; None with one.
      change: Mean of the points over the float twin.
      change_sd: Standard deviation of these; None with one seed.
      bytes: Mean size of the files; None where none was written.
      zstd: Mean size after zstd, level 9.
      zeros: Least share of zeros.
      distinct: Most different values in one channel.
      step: Processor time of training steps over that of the float twin, median of all rounds; None where too few were run.
      step_low: Lower quartile of the same.
      step_high: Upper quartile.
      runs: One per seed.
      notes: What to know of it.
    """

    label: str
    apply: tuple[dict[str, Any], ...]
    score: float
    score_sd: float | None
    change: float
    change_sd: float | None
    bytes: float | None
    zstd: float | None
    zeros: float | None
    distinct: int | None
    step: float | None
    step_low: float | None
    step_high: float | None
    runs: tuple[AlgorithmRun, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class AlgorithmTable:
    """All algorithms on one model and data set.

    Attributes:
      data: Name of the data set.
      model: Name of the model.
      parameters: Of the model.
      samples: How many to train on, and how many to test on with each seed.
      rows: The float twin first.
    """

    data: str
    model: str
    parameters: int
    samples: tuple[int, int]
    rows: tuple[AlgorithmRow, ...]


@dataclass(frozen=True)
class AlgorithmBench:
    """What `paring.bench_algorithms` gives.

    Attributes:
      backend: Of Keras.
      steps: Of training in float, and again of every algorithm and of the float twin.
      batch: Samples in a step.
      seeds: How many.
      tables: One per data set and model.
      seconds: What all took, wall time.
      notes: What to know of the whole.
    """

    backend: str
    steps: int
    batch: int
    seeds: int
    tables: tuple[AlgorithmTable, ...]
    seconds: float
    notes: tuple[str, ...] = ()
