"""What runs inside an attached model: the phase, the step, and what a site does with a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.backend.common import global_state  # the phase of a running call has no public name

from paring.calibration import HISTOGRAM, RANGE, TensorStatistics
from paring.errors import InputError
from paring.recipe import Recipe
from paring.training import ranges
from paring.training.sites import Site, Sites
from paring.training.state import State
from paring.training.weights import normalizing

MOMENTUM = 0.99
NORMAL, CALIBRATE, ANNOTATE = "normal", "calibrate", "annotate"


@dataclass(frozen=True)
class Row:
    """What became of one operation of the model.

    Attributes:
      path: Names of the models and layers around it, and its own.
      kind: Canonical kind.
      became: What is done with its weights and activations; `float` for nothing.
      reason: Which rule said so, or why it stays float.
      weights: Number of weights.
    """

    path: str
    kind: str
    became: str
    reason: str
    weights: int = 0


@dataclass(eq=False)
class Attachment:
    """A recipe at work in a live model.

    Attributes:
      model: The model, in whose layers it works.
      recipe: What was asked for.
      state: Its variables.
      rows: What became of each operation.
      sites: Where activations are quantized.
    """

    model: Any
    recipe: Recipe
    state: State = field(repr=False)
    rows: tuple[Row, ...] = field(repr=False, default=())
    sites: Sites = field(repr=False, default_factory=Sites)
    optimizer: Any = field(repr=False, default=None)
    momentum: float = MOMENTUM
    mode: str = NORMAL
    rounds: bool = False
    frozen: dict[Any, Any] = field(repr=False, default_factory=dict)
    compressed: dict[Any, Any] = field(repr=False, default_factory=dict)
    labels: dict[Any, int] = field(repr=False, default_factory=dict)
    settings: dict[int, Any] = field(repr=False, default_factory=dict)
    holds: list[tuple[Any, Callable[[Any], Any]]] = field(repr=False, default_factory=list)
    undo: list[Callable[[], None]] = field(repr=False, default_factory=list)
    _phase: list[bool] = field(repr=False, default_factory=list)
    _seen: dict[int, TensorStatistics] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        width = max((len(r.path) for r in self.rows), default=0)
        return "\n".join(f"{r.path:{width}}  {r.became:24}  {r.reason}" for r in self.rows)

    # -- steps -----------------------------------------------------------------------------------------------------

    def advance(self, steps: int = 1) -> None:
        """Counts training steps, for loops without a Keras optimizer."""
        self.state.named["step"].assign_add(float(steps))
        for variable, hold in self.holds:
            variable.assign(hold(variable))

    def stateless_advance(
        self, trainable: Sequence[Any], non_trainable: Sequence[Any], steps: int = 1
    ) -> tuple[list[Any], list[Any]]:
        """`advance` as a pure function, for compiled loops around `model.stateless_call`: call it behind the optimizer's step.

        Args:
          trainable: Values of `model.trainable_variables`.
          non_trainable: Values of `model.non_trainable_variables`.
          steps: How many steps were made.

        Returns:
          Both lists, with the counter moved on and pruned weights at zero.
        """
        return self.carried(trainable, non_trainable, lambda step: step + float(steps))

    def carried(
        self, trainable: Sequence[Any], non_trainable: Sequence[Any], count: Callable[[Any], Any]
    ) -> tuple[list[Any], list[Any]]:
        """Values of the model's variables behind a step, with the counter as `count` makes it of the one before."""
        trained, others = list(trainable), list(non_trainable)
        counter = _place(self.model.non_trainable_variables, self.state.named["step"])
        others[counter] = count(others[counter])
        mapping = [*zip(self.model.trainable_variables, trained, strict=True)]
        mapping += zip(self.model.non_trainable_variables, others, strict=True)
        places = {id(v): n for n, v in enumerate(self.model.trainable_variables)}
        with keras.StatelessScope(mapping):
            for variable, hold in self.holds:
                if (place := places.get(id(variable))) is not None:
                    trained[place] = hold(trained[place])
        return trained, others

    def step(self) -> Any:
        """The steps so far, float32 scalar: those of the optimizer where there is one."""
        optimizer = self.optimizer or getattr(self.model, "optimizer", None)
        if optimizer is not None and keras.backend.backend() != "jax":
            return ops.cast(ops.convert_to_tensor(optimizer.iterations), "float32")
        return ops.convert_to_tensor(self.state.named["step"])  # on JAX `backends.follow` keeps it

    # -- phases ----------------------------------------------------------------------------------------------------

    @contextmanager
    def phase(self, training: bool | None) -> Iterator[None]:
        """Around the call of the whole model: whether it trains is asked here, for layers inside may say otherwise.

        Args:
          training: What `call` was told. None: what Keras knows of the running call, of which nothing is known where `call` was
            called directly, as `stateless_call` does.
        """
        self._phase.append(_context() if training is None else bool(training))
        try:
            yield
        finally:
            self._phase.pop()

    @property
    def training(self) -> bool:
        """True while the model is called for training."""
        if self.mode != NORMAL:
            return False
        return self._phase[-1] if self._phase else _context()

    @contextmanager
    def working(self, mode: str) -> Iterator[None]:
        """The model in another mode: functions compiled before are thrown away on both sides."""
        self.mode, before = mode, self.mode
        self.forget()
        try:
            yield
        finally:
            self.mode = before
            self.forget()

    @contextmanager
    def annotating(self, *, variables: bool = False) -> Iterator[None]:
        """The model as it is exported: sites are marked, weights are constants.

        With `variables` weights stay variables, which hold what they become while this lasts, and what meets them is rounded to
        bfloat16 where it is in training.
        """
        self.frozen, self.rounds = {}, variables
        values: list[tuple[Any, Any]] = []
        for site in self.sites.all():
            self.range(site)
            self.frozen[site] = self._frozen_grid(site)
        for layer, compressed in self.compressed.items():
            if compressed.factored:
                parts = compressed.factors(training=False, step=None)
                self.frozen[layer] = [None if v is None else ops.convert_to_numpy(v) for v in parts]
                continue
            shown, added = compressed.values(training=False, step=None, scale=self.scale(self.source(layer)))
            constants = [(variable, ops.convert_to_numpy(value)) for variable, value in shown]
            values += constants if variables else ()
            self.frozen[layer] = () if variables else constants, None if added is None else ops.convert_to_numpy(added)
        for norm, source in self.sites.alone.items():
            factor, shift = normalizing(norm, self.scale(source))
            self.frozen[norm] = ops.convert_to_numpy(factor), ops.convert_to_numpy(shift)
        raw = [(variable, ops.convert_to_numpy(variable)) for variable, _ in values]
        try:
            for variable, value in values:
                variable.assign(value)
            with self.working(ANNOTATE):
                yield
        finally:
            for variable, value in raw:
                variable.assign(value)
            self.frozen, self.rounds = {}, False

    def _frozen_grid(self, site: Site) -> tuple[float, float]:
        if site in self.frozen:
            return self.frozen[site]
        if site.fixed is not None and site.bits == 8:
            return (site.fixed[1] - site.fixed[0]) / 255, -site.fixed[0] * 255 / (site.fixed[1] - site.fixed[0])
        if site.fixed is not None:
            return site.fixed[1] / 32767, 0.0
        found = self.grid(site)
        assert found is not None
        return float(ops.convert_to_numpy(found[0])), float(ops.convert_to_numpy(found[1]))

    def source(self, layer: Any) -> Site | None:
        """The site of what meets the weights that are added up with a layer's bias."""
        inside = self.sites.inside.get(layer)
        if inside and len(self.compressed[layer].targets) > 1:  # a separable convolution's pointwise one
            return inside[0]
        return self.sites.source.get(layer)

    def forget(self) -> None:
        """Throws compiled functions away."""
        for name in ("train_function", "test_function", "predict_function"):
            if getattr(self.model, name, None) is not None:
                setattr(self.model, name, None)

    # -- sites -----------------------------------------------------------------------------------------------------

    def at(self, site: Site | None, x: Any) -> Any:
        """A value at a site."""
        if site is None or not hasattr(x, "dtype"):
            return x
        follows, site = site.follows, site.root()
        if self.mode == CALIBRATE:
            if site.fixed is None and not follows:
                self._seen.setdefault(id(site), TensorStatistics.for_requests({RANGE, HISTOGRAM})).update(
                    np.asarray(ops.convert_to_numpy(x), np.float32), {RANGE, HISTOGRAM}
                )
            return x
        if self.mode == ANNOTATE:
            from paring.training import marks  # TensorFlow: only where a model is exported

            return marks.annotate(x, *self._frozen_grid(site), site.bits)
        if site.fixed is not None:
            low, high = (ops.convert_to_tensor(v, "float32") for v in site.fixed)
            return (ranges.train if self.training else ranges.evaluate)(x, low, high, site.bits)
        variable = self.state.named[f"range/{site.name}"]
        now = ops.convert_to_tensor(variable)
        if not self.training:
            set_ = ops.cast(now[1] > now[0], x.dtype)
            return set_ * ranges.evaluate(x, now[0], now[1], site.bits, site.symmetric) + (1 - set_) * x
        if not (variable.trainable or follows):
            wide = ops.cast(ops.stop_gradient(x), "float32")
            here = ops.stack([ops.minimum(ops.min(wide), 0.0), ops.maximum(ops.max(wide), 0.0)])
            now = ops.where(now[1] > now[0], now + (1 - self.momentum) * (here - now), here)
            variable.assign(now)
        return ranges.train(x, now[0], now[1], site.bits, site.symmetric)

    def scale(self, site: Site | None) -> Any:
        """The step of a site's grid, float32 scalar; None where there is none."""
        found = self.grid(site)
        return None if found is None else found[0]

    def grid(self, site: Site | None) -> tuple[Any, Any] | None:
        """Step and zero point of a site's grid, float32 scalars; None where there is none."""
        if site is None or self.mode == CALIBRATE:
            return None
        site = site.root()
        if site.fixed is not None:
            low, high = (ops.convert_to_tensor(v, "float32") for v in site.fixed)
        else:
            now = ops.convert_to_tensor(self.state.named[f"range/{site.name}"])
            low, high = now[0], now[1]
        return ranges.exact_grid(low, high, site.bits, site.symmetric)

    def range(self, site: Site) -> tuple[float, float]:
        """The range of a site as it is now.

        Raises:
          InputError: It was never seen, or is not finite.
        """
        if site.fixed is not None:
            return site.fixed
        low, high = (float(v) for v in ops.convert_to_numpy(self.state.named[f"range/{site.name}"]))
        if not np.isfinite([low, high]).all():
            raise InputError(
                "a range is not finite", where=f"layer {site.name}", expected="finite values", got=f"[{low}, {high}]",
                todo="Lower the learning rate if training diverged, check the data for infinities, or exempt the layer",
            )  # fmt: skip
        if low >= high:
            raise InputError(
                "a range was never seen", where=f"layer {site.name}", expected="values before the export",
                todo="Give attach data=, or train for a step, so that this layer sees values",
            )  # fmt: skip
        return low, high

    def calibrated(self, how: str, percentile: float) -> None:
        """Sets the ranges from what the sites have seen; `how` is the kind of range."""
        for site in self.sites.all():
            seen = self._seen.get(id(site))
            if seen is None or not seen.count:
                continue
            if not np.isfinite([seen.low, seen.high]).all():
                raise InputError(
                    "cannot calibrate", where=f"layer {site.name}", expected="finite values", got=f"[{seen.low}, {seen.high}]",
                    todo="Check the data's range",
                )  # fmt: skip
            low, high = seen.range(how, percentile, 2**site.bits)
            low, high = min(low, 0.0), max(high, 0.0)
            self.state.named[f"range/{site.name}"].assign(np.array([low, max(high, low + 1e-6)], np.float32))
        self._seen.clear()


def _context() -> bool:
    found = global_state.get_global_attribute("current_call_ctx")
    return bool(found.get_value("training")) if found is not None else False


def _place(variables: Sequence[Any], wanted: Any) -> int:
    return next(n for n, v in enumerate(variables) if v is wanted)
