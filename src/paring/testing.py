"""check_algorithm: whether a compression algorithm, built-in or of your own, keeps the contract of the Compression API."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from paring.compress import Algorithm, Chain, Cluster, Context, LowRank, Quantize, Sparsify, chain
from paring.errors import BoundError, InputError
from paring.recipe import Recipe, Rule

BACKENDS = ("tensorflow", "jax", "torch")
OK, FAILED, UNCHECKED = "ok", "FAILED", "not checked"
BUILT_IN = (Sparsify(0.5), Cluster(8), LowRank(rank=4), Quantize("int8", "float"))
SAMPLES = (("dense 32x256", (32, 256), 1), ("3x3 convolution 16x16", (16, 144), 9))
BIG = (256, 8192)
MEMORY = 16  # times the weight's bytes that compressing it may take
CLOSE = 1e-5  # of a weight's largest value: what rounding may change where no bit needs to be kept
_LONGEST = 600  # seconds that one backend may take


@dataclass(frozen=True)
class Row:
    """One thing that was checked.

    Attributes:
      check: What.
      where: `numpy` or a Keras backend.
      outcome: `ok`, `FAILED` or `not checked`.
      detail: What failed and what to do, or what was given up or refused.
    """

    check: str
    where: str
    outcome: str
    detail: str = ""


@dataclass(frozen=True)
class Checked:
    """What `check_algorithm` found; prints as a table.

    Attributes:
      algorithm: What was checked, as its repr.
      rows: One per check.
    """

    algorithm: str
    rows: tuple[Row, ...]

    @property
    def failures(self) -> tuple[Row, ...]:
        """The rows that failed."""
        return tuple(row for row in self.rows if row.outcome == FAILED)

    @property
    def ok(self) -> bool:
        """Whether nothing failed; what was not checked does not count."""
        return not self.failures

    def __str__(self) -> str:
        names = [f.name for f in fields(Row)]
        lines = [names, *([str(v) for v in asdict(row).values()] for row in self.rows)]
        widths = [*(max(len(line[column]) for line in lines) for column in range(3)), 0]
        table = ["  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([self.algorithm, *table])


def check_algorithm(
    algorithm: Algorithm, backends: Sequence[str] = BACKENDS, *, raises: bool = True, timeout: float = _LONGEST
) -> Checked:
    """Checks an algorithm, alone and in a chain before and behind each built-in one, in NumPy and under training.

    Checked are: settings through a recipe; encode and decode; the same result twice; memory on a large weight; on each Keras
    backend that is installed, in a process of its own: variables and their updates, gradients, what compiled training leaves,
    and that all promises are kept or given up openly (`Algorithm.makes`, `Algorithm.gives_up`).

    Args:
      algorithm: The algorithm with its settings. To be checked under training its class must be importable: defined at the top
        of a module or of a script whose work stands under `if __name__ == "__main__":`.
      backends: Of Keras, any of `tensorflow`, `jax`, `torch`; empty: only what NumPy can tell.
      raises: Whether a failure raises; else look at `ok`.
      timeout: Seconds that one backend may take.

    Raises:
      BoundError: A check failed; the message names the first, `detail` holds the table.
      InputError: It is no algorithm, or a backend is unknown.

    >>> from paring.compress import Cluster
    >>> found = check_algorithm(Cluster(4), backends=())
    >>> found.ok, found.rows[0]
    (True, Row(check='settings through a recipe', where='numpy', outcome='ok', detail=''))
    """
    if not isinstance(algorithm, Algorithm):
        todo = "Derive its class from paring.compress.Algorithm"
        raise InputError("cannot check", expected="an algorithm with its settings", got=repr(algorithm), todo=todo)
    if unknown := set(backends) - set(BACKENDS):
        raise InputError("unknown backend", where=", ".join(unknown), expected=", ".join(BACKENDS))
    rows = [_outcome(name, "numpy", check, algorithm) for name, check in _NUMPY.items()]
    rows += [_outcome(name, "numpy", _pair_once, pair) for name, pair in pairs(algorithm)]
    for backend in backends:
        rows += _on_backend(algorithm, backend, timeout)
    found = Checked(repr(algorithm), tuple(rows))
    if raises and not found.ok:
        first = found.failures[0]
        raise _failure(found, first)
    return found


def samples() -> Iterator[tuple[str, np.ndarray, Context]]:
    """Weights as training gives them: name, float32 [outputs, taps * inputs], context; channels of different sizes."""
    for number, (name, shape, taps) in enumerate(SAMPLES):
        rng = np.random.default_rng(number)
        spread = np.exp(rng.standard_normal((shape[0], 1)))
        yield name, (rng.standard_normal(shape) * spread).astype(np.float32), Context(name, 0, (1,), taps=taps)


def pairs(algorithm: Algorithm) -> Iterator[tuple[str, Chain]]:
    """The algorithm behind and before each built-in one, but those of its own kind."""
    kinds = {type(stage) for stage in (algorithm.stages if isinstance(algorithm, Chain) else (algorithm,))}
    for other in BUILT_IN:
        if type(other) not in kinds:
            yield f"behind {type(other).__name__}", chain(other, algorithm)
            yield f"before {type(other).__name__}", chain(algorithm, other)


def broken(stages: Sequence[Algorithm], unmet: Sequence[Sequence[str]]) -> str:
    """What stages promised, does not hold, and was not given up openly; raises AssertionError for that.

    Args:
      stages: Of a chain.
      unmet: For each of them, what it does not hold.

    Returns:
      What was given up openly, in words.
    """
    given_up = []
    for number, (stage, texts) in enumerate(zip(stages, unmet, strict=True)):
        if not texts:
            continue
        name = type(stage).__name__
        by = [type(later).__name__ for later in stages[number + 1 :] if stage.makes & later.gives_up]
        assert by, (
            f"{name} promises what does not hold: {texts[0]}. Keep it, or say so in `makes` of the one that promises and in "
            "`gives_up` of the one behind"
        )
        given_up.append(f"{by[0]} gives up: {texts[0]}")
    return "; ".join(given_up)


# -- in NumPy ----------------------------------------------------------------------------------------------------------


def _settings(algorithm: Algorithm) -> str:
    stages = algorithm.stages if isinstance(algorithm, Chain) else (algorithm,)
    assert all("__dataclass_fields__" in vars(type(stage)) for stage in stages), (
        f"{type(algorithm).__name__} is no dataclass. Write @dataclass(frozen=True) above the class"
    )
    try:
        back = Recipe.parse(Recipe((Rule(stages=stages),)).to_yaml()).rules[0].stages
    except Exception as error:
        raise AssertionError(f"a recipe cannot hold it: {error}") from error
    assert back == stages, f"a recipe gives back {back!r}. Settings must be plain data, and be the fields"
    hash(algorithm)
    return ""


def _round_trip(algorithm: Algorithm) -> str:
    refused = []
    shapes: tuple[tuple[tuple[int, ...], int], ...] = (((32, 256), 0), ((16, 3, 3, 16), 0), ((1, 3, 3, 24), 3))
    for shape, axis in shapes:
        weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        context = Context("sample", axis, tuple(d for d in range(len(shape)) if d != axis))
        for name, given in (("random weights", weight), ("zeros", np.zeros(shape, np.float32))):
            kept = given.copy()
            try:
                encoded = algorithm.encode(given, context)
            except InputError as error:
                refused.append(f"{'x'.join(map(str, shape))}: {error}")
                continue
            found = algorithm.decode(encoded)
            where = f"{name} {'x'.join(map(str, shape))}"
            assert np.array_equal(given, kept), f"encode changes its argument ({where}). Work on a copy"
            assert found.shape == shape, f"decode gives shape {found.shape} for {where}"
            assert found.dtype == np.float32, f"decode gives {found.dtype} for {where}, not float32"
            assert np.isfinite(found).all(), f"decode gives infinity or not-a-number for {where}"
            again = algorithm.decode(algorithm.encode(found, context))
            _near(again, found, f"what it compressed once changes when it is compressed again ({where})")
    assert len(refused) < 2 * len(shapes), f"it refuses every weight: {refused[0]}"
    return f"refuses {refused[0]}" if refused else ""


def _same_twice(algorithm: Algorithm) -> str:
    for _, weight, context in samples():
        try:
            one, two = (algorithm.encode(weight.copy(), context) for _ in range(2))
        except InputError:  # said by the check before
            continue
        assert np.array_equal(one.values, two.values), (
            "encode gives different values twice. Draw from a seeded generator"
        )
        (settled,) = algorithm.resolved(10, 4).allocate([weight], [context])
        first, second = (settled.variables(weight.copy(), context) for _ in range(2))
        assert list(first) == list(second), "variables gives different names twice"
        for name, extra in first.items():
            assert np.array_equal(extra.value, second[name].value), f"variables gives a different {name} twice"
    return ""


def _memory(algorithm: Algorithm) -> str:
    weight = np.random.default_rng(0).standard_normal(BIG, np.float32)
    tracemalloc.start()
    try:
        algorithm.encode(weight, Context("large", 0, (1,)))
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    times = taken / weight.nbytes
    assert times <= MEMORY, (
        f"encode takes {times:.0f} times the memory of a large weight, not at most {MEMORY}. Work in chunks"
    )
    return f"{times:.1f} times the weight"


def _pair_once(pair: Chain) -> str:
    """A chain's promises where nothing is trained."""
    given_up = []
    for _, weight, context in samples():
        try:
            encoded = pair.encode(weight, context)
        except InputError as error:
            given_up.append(f"refused: {error}")
            continue
        given_up.append(broken(pair.stages, pair.unmet(pair.decode(encoded), encoded.factors, context)))
    return next(filter(None, given_up), "")


_NUMPY: dict[str, Callable[[Any], str]] = {
    "settings through a recipe": _settings,
    "encode and decode": _round_trip,
    "the same twice": _same_twice,
    "memory": _memory,
}


def _near(found: np.ndarray, wanted: np.ndarray, what: str) -> None:
    limit = CLOSE * max(float(np.abs(wanted).max(initial=0.0)), 1e-6)
    worst = float(np.abs(found - wanted).max(initial=0.0))
    assert worst <= limit, f"{what}: by up to {worst:.3g}, expected at most {limit:.3g}"


def _outcome(name: str, where: str, check: Callable[[Any], str], argument: Any) -> Row:
    """A row for what a check says, or for how it fails."""
    try:
        return Row(name, where, OK, check(argument))
    except AssertionError as error:
        return Row(name, where, FAILED, str(error))
    except Exception as error:
        return Row(name, where, FAILED, f"{type(error).__name__}: {error}")


def _failure(found: Checked, first: Row) -> BoundError:
    more = len(found.failures) - 1
    error = BoundError(
        f"{found.algorithm} breaks the contract in {first.check!r} on {first.where}: {first.detail}"
        + (f" (and {more} more)" if more else "")
    )
    error.detail = str(found)
    return error


# -- under training ----------------------------------------------------------------------------------------------------

_CHILD = """
import sys
sys.path[:] = {path!r}
from paring.training.rehearse import main
main({source!r})
"""


def _on_backend(algorithm: Algorithm, backend: str, timeout: float) -> list[Row]:
    """What a process of its own finds, since Keras has one backend per process."""
    check = "training"
    for module in ("keras", backend):
        if importlib.util.find_spec(module) is None:
            return [Row(check, backend, UNCHECKED, f"{module} is not installed")]
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    stages = algorithm.stages if isinstance(algorithm, Chain) else (algorithm,)
    for stage in stages:
        kind = type(stage)
        if "<locals>" in kind.__qualname__ or (kind.__module__ == "__main__" and not script):
            return [Row(check, backend, UNCHECKED, f"{kind.__qualname__} cannot be imported: put it into a module")]
    recipe = Recipe((Rule(stages=stages),)).to_yaml()
    source = str(script) if any(type(stage).__module__ == "__main__" for stage in stages) else ""
    program = _CHILD.format(path=[p if p else os.getcwd() for p in sys.path], source=source)
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "JAX_PLATFORMS": "cpu"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program],
            input=recipe,
            capture_output=True,
            text=True,
            env=environment,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return [Row(check, backend, FAILED, f"it takes longer than {timeout:g} s")]
    answer = done.stdout.rpartition("\n\x1e")[2]
    if done.returncode or not answer:
        said = done.stderr.strip().splitlines()
        return [Row(check, backend, FAILED, f"the process ended with {done.returncode}: {said[-1] if said else ''}")]
    return [Row(**row) for row in json.loads(answer)]
