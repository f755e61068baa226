"""An algorithm under training on one Keras backend: what `paring.testing` runs in a process of its own.

One layer that holds a weight and shows its projection is trained by Keras itself, compiled as every model is.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from paring.compress import Algorithm, Chain, Context, chain
from paring.errors import InputError
from paring.recipe import Recipe
from paring.testing import BIG, CLOSE, FAILED, OK, Row, broken, pairs, samples

STEPS = (*range(24), 40, 100, 300, 1000, 10_000, 100_000, 1_000_000)
EPOCH = 10  # steps, of four epochs, for schedules in epochs or fractions
MEMORY = 48  # times the weight's bytes that one training step may take, gradients and compilation included
RATE = 0.01


class Rehearsal:
    """One weight under training.

    Attributes:
      algorithm: With schedules in steps.
      context: Of the weight.
      model: A Keras model whose output is the projected weight.
      layer: Its layer.
    """

    def __init__(self, algorithm: Algorithm, weight: np.ndarray, context: Context, *, jit: bool, rate: float) -> None:
        """Builds and compiles the model."""
        import keras

        algorithm = algorithm.resolved(EPOCH, 4)
        (algorithm,) = algorithm.allocate([weight], [context])
        self.algorithm, self.context, self.keras = algorithm, context, keras
        extras = algorithm.variables(weight, context)
        for name, extra in extras.items():
            assert isinstance(extra.value, np.ndarray), (
                f"the variable {name} starts with {type(extra.value).__name__}, not an array"
            )

        class Shown(keras.layers.Layer):
            def __init__(self) -> None:
                super().__init__()
                held = keras.initializers.Constant
                self.raw = self.add_weight(shape=weight.shape, initializer=held(weight), name="raw")
                self.extras = {
                    name: self.add_weight(
                        shape=e.value.shape, initializer=held(e.value), trainable=e.trainable, dtype=str(e.value.dtype),
                        name=name.replace(".", "_"),
                    ) for name, e in extras.items()
                }  # fmt: skip
                # Always has a gradient: without any, Keras refuses to train.
                self.anchor = self.add_weight(shape=(), initializer="zeros", name="anchor")
                self.step = self.add_weight(shape=(), initializer="zeros", trainable=False, name="step")

            def call(self, x: Any, training: bool = False) -> Any:
                ops = keras.ops
                raw = ops.convert_to_tensor(self.raw)
                now = {name: ops.convert_to_tensor(v) for name, v in self.extras.items()}
                step = ops.convert_to_tensor(self.step) if training else ops.convert_to_tensor(np.float32(np.inf))
                if training:
                    for name, new in algorithm.update(ops, ops.stop_gradient(raw), now, step, context).items():
                        assert name in now, f"update gives {name!r}, which is none of its variables"
                        assert tuple(new.shape) == tuple(now[name].shape), (
                            f"update gives {name} another shape: {new.shape}"
                        )
                        now[name] = ops.stop_gradient(ops.cast(new, now[name].dtype))
                        self.extras[name].assign(now[name])
                shown = algorithm.project(ops, raw, now, step, context)
                assert tuple(shown.shape) == weight.shape, (
                    f"project gives shape {tuple(shown.shape)}, not {weight.shape}"
                )
                return ops.expand_dims(shown, 0) + 0.0 * (self.anchor + ops.reshape(x, (1, 1, 1)))

        self.layer = Shown()
        self.model = keras.Sequential([keras.Input((1,), batch_size=1), self.layer])

        def product(wanted: Any, shown: Any) -> Any:
            return keras.ops.sum(wanted * shown)

        self.model.compile(keras.optimizers.SGD(rate), product, jit_compile=jit)

    def train(self, step: int, gradient: np.ndarray) -> None:
        """One step of the optimizer, with this gradient of the projected weight."""
        self.layer.step.assign(float(step))
        self.model.train_on_batch(np.zeros((1, 1), np.float32), gradient[None])
        ops = self.keras.ops
        held = self.algorithm.hold(ops, ops.convert_to_tensor(self.layer.raw), self.extras, self.context)
        if held is not None:
            self.layer.raw.assign(held)

    @property
    def extras(self) -> dict[str, Any]:
        """Present values of the algorithm's variables."""
        return {name: self.keras.ops.convert_to_tensor(v) for name, v in self.layer.extras.items()}

    def finished(self) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray] | None]:
        """The weight as evaluation sees it, and its factors where it has some."""
        numpy = self.keras.ops.convert_to_numpy
        found = np.array(self.model.predict_on_batch(np.zeros((1, 1), np.float32))[0])
        factors = self.algorithm.factors(
            self.keras.ops,
            self.keras.ops.convert_to_tensor(self.layer.raw),
            self.extras,
            np.float32(np.inf),
            self.context,
        )
        return found, None if factors is None else (np.array(numpy(factors[0])), np.array(numpy(factors[1])))


def compilations() -> tuple[bool, ...]:
    """Whether models are compiled by XLA, the usual way first: TensorFlow's are in both ways, JAX's are, PyTorch's are not."""
    import keras

    return {"tensorflow": (False, True), "jax": (True,)}.get(keras.config.backend(), (False,))


def trained(algorithm: Algorithm, weight: np.ndarray, context: Context, *, jit: bool) -> Rehearsal:
    """A weight behind a schedule's length of steps in seeded directions."""
    rng = np.random.default_rng(1)
    found = Rehearsal(algorithm, weight, context, jit=jit, rate=RATE)
    for step in STEPS:
        found.train(step, rng.standard_normal(weight.shape).astype(np.float32) * weight.std())
    return found


def kept(one: Rehearsal) -> str:
    """What was given up openly; raises AssertionError where a promise is broken otherwise."""
    found, factors = one.finished()
    assert np.isfinite(found).all(), f"training leaves infinity or not-a-number ({one.context.name})"
    if isinstance(one.algorithm, Chain):
        return broken(one.algorithm.stages, one.algorithm.unmet(found, factors, one.context))
    return broken([one.algorithm], [one.algorithm.promises(found, one.context)])


def _training(algorithm: Algorithm) -> str:
    """What training leaves is finite, the same twice, what a file can hold, and keeps the promises."""
    said = []
    for name, weight, context in samples():
        try:
            one, *others = (trained(algorithm, weight, context, jit=jit) for jit in compilations())
        except InputError as error:
            said.append(f"refuses {name}: {error}")
            continue
        found, _ = one.finished()
        again, _ = one.finished()
        assert np.array_equal(found, again), f"evaluation gives different weights twice ({name})"
        # Compiled differently, sums may be rounded differently, and a weight between two codes may take the other.
        for other in others:
            apart = float(np.mean(np.abs(other.finished()[0] - found) > 1e-3 * np.abs(weight).max()))
            assert apart < 0.05, (
                f"compiled by XLA, {100 * apart:.0f} % of the weights are trained to other values ({name})"
            )
        once = algorithm.decode(algorithm.encode(found, context))
        limit = CLOSE * float(np.abs(found).max())
        worst = float(np.abs(once - found).max())
        assert worst <= limit, (
            f"encode changes what training leaves by up to {worst:.3g} ({name}): a file would hold other weights than those "
            "that were measured. Let project give values that encode keeps"
        )
        said.append(kept(one))
    return next(filter(None, said), "")


def _gradients(algorithm: Algorithm) -> str:
    """Gradients reach every trained variable, and the weight unless the algorithm says otherwise."""
    said = ""
    for name, weight, context in samples():
        try:
            one = Rehearsal(algorithm, weight, context, jit=compilations()[-1], rate=1.0)
        except InputError as error:
            said = f"refuses {name}: {error}"
            continue
        last = STEPS[-1]
        for step in (0, last):  # what is scheduled has happened
            before = {v.path: np.array(v) for v in one.layer.trainable_variables}
            rng = np.random.default_rng(2)
            one.train(step, rng.standard_normal(weight.shape).astype(np.float32))
        for variable in (v for v in one.layer.trainable_variables if v is not one.layer.anchor):
            now = np.array(variable)
            assert np.isfinite(now).all(), f"the gradient of {variable.name} is infinite or not-a-number ({name})"
            moved = not np.array_equal(before[variable.path], now)
            if variable is one.layer.raw:
                wanted = algorithm.trains_weight
                assert moved or not wanted, (
                    f"no gradient reaches the weight ({name}). Write `through(ops, value, weight)` (paring.compress.straight), "
                    "or set trains_weight = False"
                )
            else:
                assert moved, (
                    f"no gradient reaches the variable {variable.name} ({name}). Use it in project, or do not train it"
                )
    return said


def _large(algorithm: Algorithm) -> str:
    """One step on a large weight takes memory in proportion."""
    weight = np.random.default_rng(0).standard_normal(BIG, np.float32)
    try:
        one = Rehearsal(algorithm, weight, Context("large", 0, (1,)), jit=compilations()[0], rate=RATE)
    except InputError as error:
        return f"refuses it: {error}"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one.train(STEPS[-1], weight)
    times = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / weight.nbytes
    assert times <= MEMORY, (
        f"a training step takes {times:.0f} times the memory of a large weight, not at most {MEMORY}"
    )
    return f"{times:.0f} times the weight"


def _pair(pair: Any) -> str:
    """The promises of a chain, for the first sample that it takes."""
    said = ""
    for name, weight, context in reversed(list(samples())):
        try:
            one = trained(pair, weight, context, jit=compilations()[0])
        except InputError as error:
            said = f"refused for {name}: {error}"
            continue
        return kept(one)
    return said


_CHECKS: dict[str, Callable[[Any], str]] = {
    "training": _training, "gradients": _gradients, "memory": _large,
}  # fmt: skip


def rehearse(algorithm: Algorithm, backend: str) -> list[Row]:
    """All checks on the backend that Keras has here."""
    wanted = [(name, check, algorithm) for name, check in _CHECKS.items()]
    wanted += [(name, _pair, pair) for name, pair in pairs(algorithm)]
    rows = []
    for name, check, argument in wanted:
        try:
            rows.append(Row(name, backend, OK, check(argument)))
        except AssertionError as error:
            rows.append(Row(name, backend, FAILED, str(error)))
        except Exception as error:
            rows.append(Row(name, backend, FAILED, f"{type(error).__name__}: {str(error)[:500]}"))
    return rows


def main(source: str) -> None:
    """Reads a recipe, rehearses its one rule and prints the rows.

    Args:
      source: The script in which the class stands, empty where a module has it; its work stands under
        `if __name__ == "__main__"`, which does not hold here.
    """
    import keras

    if source:
        spec = importlib.util.spec_from_file_location("__paring_main__", source)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["__main__"] = sys.modules["__paring_main__"] = module
        spec.loader.exec_module(module)
    stages = Recipe.parse(sys.stdin.read()).rules[0].stages
    algorithm = stages[0] if len(stages) == 1 else chain(*stages)
    rows = rehearse(algorithm, keras.config.backend())
    print("\n\x1e" + json.dumps([asdict(row) for row in rows]))
