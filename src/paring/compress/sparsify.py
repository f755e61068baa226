"""Sparsify: zeros in a pattern, chosen and made good together so that the layer's output suffers least."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from paring.compress.allocate import SHARES, allocate, erdos_renyi_kernel, one_threshold
from paring.compress.base import Algorithm, Context, Encoded, Extra
from paring.compress.gram import Gram
from paring.compress.mask import check_fits, choose
from paring.compress.pattern import UNSTRUCTURED, Pattern
from paring.compress.schedule import SCHEDULES, UNITS, check_time, in_steps, must_be_steps, progress
from paring.compress.support import PROMISE, fit
from paring.compress.unfold import Unfolding
from paring.errors import InputError

CHOICES: dict[str, tuple[str, ...]] = {
    "storage": ("dense", "sparse"),
    "allocation": ("uniform", "error", "global", "erk"),
    "schedule": SCHEDULES,
    "unit": UNITS,
}
STEPS, LEAST = 100, 25  # rounds of the search: for rows of up to WIDE inputs, and for the widest
WIDE = 1024
LOOSE, TIGHT = (
    0.03,
    1.0,
)  # how strongly weights are drawn to the pattern, in the inputs' own power: at first, in the end
SETTLED = 3  # rounds in which no zero moves
Choose = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Sparsify(Algorithm):
    """Pruning: of a weight as it is, or gradually while it is trained.

    Once, with data: the zeros are searched for by the alternating direction method of multipliers (Boyd et al. 2011; for
    pruning: Meng, Behdin, Wang, Mazumder: ALPS, NeurIPS 2024) and the weights that stay are the exact optimum for these zeros
    (Frantar, Alistarh: Optimal Brain Compression, NeurIPS 2022, solve the same problem greedily). Without data the smallest
    weights go, and the others stay as they are.

    In training the smallest weights go as the schedule says, and do not come back; their gradients do not count. Where
    pruning begins at once, with a constant schedule, and `attach` gets data, training begins with what pruning once makes of
    the layers: zeros and weights chosen by data. Settings of the schedule change nothing outside training.

    Attributes:
      sparsity: Share of weights that become zero, above 0 and below 1; not needed with N:M patterns.
      pattern: `unstructured`, blocks of outputs x inputs (`4x1`, `16x1`, `16x4`, ...) or N of M inputs (`2:4`). Empty: what
        the target gains most from, `unstructured` without a target.
      target: The runtime that has to gain; layers from which it would not gain are left alone. Empty: all layers.
      storage: `dense`, which every runtime reads, or `sparse`: zeros take no room in the file; only where that is read right.
      allocation: `uniform`: each layer gets the same share of zeros. `error` (needs data): layers that one rule selects share
        the zeros so that the sum of their relative output errors is least. Also `global`: one threshold for the
        weights of all of them; `erk`: shares by layers' sizes (Erdos-Renyi kernels; Evci et al., ICML 2020).
      damping: Share of the mean second moment that is added to each input's.
      bias_correction: Shift the bias so that the mean output is that of the dense weights (needs data).
      mend: Layers that the rule selects but that are not pruned are fitted to what they read behind pruned ones (needs data).
      min_size: Layers with fewer weights are not pruned.
      schedule: `constant`: all zeros at `start`; `polynomial` (cubic) or `cosine`: from `initial` at `start` to all at `end`.
      start: When pruning begins.
      end: When the last zeros are made; needed unless constant.
      unit: Of both: `steps`, `epochs`, or `fraction` of training.
      every: Steps between two choices of zeros.
      initial: Share of zeros at `start`.

    >>> s = Sparsify(0.5, "2x1")
    >>> w = np.array([[0.1, 0.4], [0.2, -0.5]], np.float32)
    >>> s.encode(w, Context("layer", axis=0)).values.tolist()
    [[0.0, 0.4000000059604645], [0.0, -0.5]]
    """

    sparsity: float | None = None
    pattern: str = ""
    target: str = ""
    storage: str = "dense"
    allocation: str = "uniform"
    damping: float = 0.01
    bias_correction: bool = True
    mend: bool = True
    min_size: int = 0
    schedule: str = "constant"
    start: float = 0
    end: float | None = None
    unit: str = "steps"
    every: int = 100
    initial: float = 0.0
    makes: ClassVar[frozenset[str]] = frozenset({"zeros"})

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                expected, got = ", ".join(allowed), repr(getattr(self, name))
                raise InputError("bad setting", where=f"sparsify.{name}", expected=expected, got=got)
        if not isinstance(self.target, str):
            raise InputError("bad setting", where="sparsify.target", expected="a name", got=repr(self.target))
        own = Pattern.parse(self.pattern).sparsity if self.pattern else None
        given = self.sparsity
        if given is not None and (type(given) not in (int, float) or not 0 < given < 1):
            raise InputError("bad setting", where="sparsify.sparsity", expected="above 0, below 1", got=repr(given))
        if own is None and given is None:
            raise InputError("bad setting", where="sparsify.sparsity", expected="the share of zeros, above 0, below 1")
        if own is not None and given is not None and abs(own - given) > 1e-3:
            raise InputError(
                "bad setting", where="sparsify.sparsity", expected=f"{own:g}, which pattern {self.pattern} makes",
                got=f"{given:g}", todo="Leave the sparsity out, or take another pattern",
            )  # fmt: skip
        if type(self.damping) not in (int, float) or not 0 < self.damping <= 1:
            expected, got = "above 0, at most 1", repr(self.damping)
            raise InputError("bad setting", where="sparsify.damping", expected=expected, got=got)
        if type(self.min_size) is not int or self.min_size < 0:
            expected, got = "a number of weights", repr(self.min_size)
            raise InputError("bad setting", where="sparsify.min_size", expected=expected, got=got)
        for name in ("bias_correction", "mend"):
            if not isinstance(getattr(self, name), bool):
                got = repr(getattr(self, name))
                raise InputError("bad setting", where=f"sparsify.{name}", expected="true or false", got=got)
        self._check_schedule(own if own is not None else given or 0.0)

    def _check_schedule(self, share: float) -> None:
        check_time(self.start, self.unit, "sparsify.start")
        if self.end is not None:
            check_time(self.end, self.unit, "sparsify.end")
        if self.schedule != "constant" and (self.end is None or self.end <= self.start):
            expected, got = f"an end behind the start ({self.start:g})", repr(self.end)
            raise InputError("bad setting", where="sparsify.end", expected=expected, got=got)
        if self.schedule == "constant" and self.end is not None:
            todo = "Leave it out, or take schedule polynomial or cosine"
            raise InputError("bad setting", where="sparsify.end", expected="none", got=f"{self.end:g}", todo=todo)
        if type(self.every) is not int or self.every < 1:
            expected, got = "a number of steps, 1 or more", repr(self.every)
            raise InputError("bad setting", where="sparsify.every", expected=expected, got=got)
        if type(self.initial) not in (int, float) or not 0 <= self.initial < share:
            expected, got = f"0 or more, below {share:g}", repr(self.initial)
            raise InputError("bad setting", where="sparsify.initial", expected=expected, got=got)

    @property
    def share(self) -> float:
        """The share of zeros in force."""
        own = Pattern.parse(self.pattern).sparsity if self.pattern else None
        return float(own if own is not None else self.sparsity or 0.0)

    def describe(self) -> str:
        """In a few words.

        >>> Sparsify(0.8, "16x1").describe()
        '80 % zeros (16x1)'
        """
        return f"{100 * self.share:.3g} % zeros ({self.pattern or self.target or UNSTRUCTURED})"

    def encode(self, weight: np.ndarray, context: Context) -> Encoded:
        """Prunes float32 weights; what is zero already stays zero where so much of it is that somebody pruned.

        Args:
          weight: float32, [outputs, ..., inputs] unless the context says how it lies as a matrix.
          context: With `gram`, the zeros are chosen by data.
        """
        if not np.isfinite(weight).all():
            raise InputError("cannot prune weights", expected="finite values", got="infinity or not-a-number")
        gram = context.gram
        layout = gram.unfolding if gram is not None else context.unfolding or Unfolding.plain(weight.shape)
        choose = self._chooser(weight, layout, self.share)
        if gram is None:
            matrix = layout.matrix(weight)
            found = matrix * choose(np.square(matrix))
        else:
            wanted, second = layout.matrix(gram.retarget(weight, self.damping)), gram.damped(self.damping)
            found = fit(wanted, second, search(wanted, basis(second), choose, _steps(second)))
        return Encoded(np.asarray(layout.tensor(found), np.float32), "float32", None)

    def mended(self, weight: np.ndarray, gram: Gram) -> Encoded:
        """The weights, none of them pruned, that give the float model's outputs from what is read behind pruned layers."""
        left = gram.unfolding.matrix(weight != 0) if np.mean(weight == 0) >= PROMISE else None
        return Encoded(gram.retarget(weight, self.damping, left), "float32", None)

    def curve(self, weight: np.ndarray, gram: Gram, shares: Iterable[float]) -> np.ndarray:
        """The output error that each share of zeros would cost, relative to the output's power, float [shares]."""
        layout = gram.unfolding
        wanted, second = layout.matrix(gram.retarget(weight, self.damping)), gram.damped(self.damping)
        turned = basis(second)

        def power(values: np.ndarray) -> float:
            return float(np.einsum("grk,grk->", values @ second, values))

        errors = [0.0 if share == 0 else power(
            wanted - fit(wanted, second, search(wanted, turned, self._chooser(weight, layout, share), LEAST))
        ) for share in shares]  # fmt: skip
        return np.array(errors) / max(power(wanted), np.finfo(float).tiny)

    def _chooser(self, weight: np.ndarray, layout: Unfolding, share: float) -> Choose:
        """From scores [groups * parts, rows, inputs] to which weights stay."""
        pattern, zeros = Pattern.parse(self.pattern or UNSTRUCTURED), weight == 0
        alive = layout.taps(layout.matrix(~zeros if zeros.mean() >= PROMISE else np.ones_like(zeros)))
        return lambda score: layout.untaps(pattern.kept(layout.taps(score), alive, share))

    def decode(self, encoded: Encoded) -> np.ndarray:
        """The weights."""
        return encoded.values

    # -- training --------------------------------------------------------------------------------------------------

    @property
    def gives_up(self) -> frozenset[str]:
        """A grid, whose largest value may go, a rank, and a number of values, to which zero is added."""
        return frozenset({"grid", "rank", "values", "tensor values"})

    def variables(self, weight: np.ndarray, context: Context) -> dict[str, Extra]:
        """The mask, and the share of zeros that it was made for.

        Raises:
          InputError: The layer is smaller than one block of the pattern, or there is a target and no pattern.
        """
        must_be_steps(self.unit, f"sparsify.schedule of {context.name}")
        if self.target and not self.pattern:
            todo = f"Name the one that {self.target} gains from; `paring inspect` shows them"
            raise InputError(
                "cannot prune in training", where=context.name, expected="a pattern", got="none", todo=todo
            )
        pattern = self._pattern
        outputs, inputs = weight.shape[0], weight.shape[1] // context.taps
        check_fits(pattern, self.pattern, outputs, inputs, context.name)
        zeros = weight == 0
        alive = ~zeros if context.pruned or zeros.mean() >= PROMISE else np.ones_like(zeros)
        share = self.share if self.start == 0 and self.schedule == "constant" else 0.0
        if share:
            cut = weight.reshape(1, outputs, context.taps, inputs)
            alive = pattern.kept(np.square(cut), alive.reshape(cut.shape), share).reshape(weight.shape)
        return {"mask": Extra(alive.astype(np.float32)), "reached": Extra(np.array(share, np.float32))}

    @property
    def by_data(self) -> bool:
        """True where all zeros are there from the first step."""
        return self.start == 0 and self.schedule == "constant"

    def prepare(self, weight: np.ndarray, context: Context) -> np.ndarray:
        """With data, the weight as it is pruned once; batch normalization counted in, behind which outputs are compared."""
        if context.gram is None or not self.by_data:
            return weight
        gain = _gain(weight, context)
        found = self.encode((weight * gain).reshape(context.gram.unfolding.shape), context).values
        return np.asarray(found.reshape(weight.shape) / gain, np.float32)

    def begin(self, weight: np.ndarray, context: Context) -> np.ndarray:
        """The weight under its first mask."""
        return np.asarray(weight * self.variables(weight, context)["mask"].value)

    def update(
        self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context
    ) -> dict[str, Any]:
        """A new mask where the schedule has come to a larger share of zeros: the choice is made only then.

        What counts is the share, not the step: the schedule also holds where steps are skipped or training is resumed.
        """
        must_be_steps(self.unit, f"sparsify.schedule of {context.name}")
        mask, reached = ops.convert_to_tensor(variables["mask"]), ops.convert_to_tensor(variables["reached"])
        passed = ops.cast(step, "float32") - float(self.start)
        length = float(self.end - self.start) if self.end is not None else 0.0
        counted = ops.where(passed >= length, length, ops.floor(passed / self.every) * self.every)
        wanted = progress(ops, self.schedule, self.initial, self.share, ops.maximum(counted, 0.0) / max(length, 1.0))
        wanted = ops.cast(ops.where(passed >= 0, wanted, 0.0), "float32")
        due = wanted > reached + 1e-6
        found = ops.cond(due, lambda: choose(ops, self._pattern, weight, mask, wanted, context.taps), lambda: mask)
        return {"mask": found, "reached": ops.where(due, wanted, reached)}

    def project(self, ops: Any, weight: Any, variables: Mapping[str, Any], step: Any, context: Context) -> Any:
        """The weight under its mask; what is masked gets no gradient."""
        return weight * variables["mask"]

    def hold(self, ops: Any, weight: Any, variables: Mapping[str, Any], context: Context) -> Any:
        """The weight under its mask: momentum and decay do not bring it back."""
        return weight * variables["mask"]

    def resolved(self, steps_per_epoch: int | None, epochs: float | None) -> Sparsify:
        """With start and end in steps."""
        start = in_steps(self.start, self.unit, steps_per_epoch, epochs, "sparsify.start")
        end = None if self.end is None else in_steps(self.end, self.unit, steps_per_epoch, epochs, "sparsify.end")
        return replace(self, start=start, end=end if end is None else max(end, start + 1), unit="steps")

    def allocate(self, weights: Sequence[np.ndarray], contexts: Sequence[Context]) -> Sequence[Sparsify]:
        """The algorithm with each layer's share, by `allocation`; N:M patterns have their own.

        Raises:
          InputError: `allocation` is `error`, and there is no data, or pruning is gradual.
        """
        if self.allocation == "uniform" or self._pattern.of or not weights:
            return [self] * len(weights)
        if self.allocation == "error":
            return self._by_error(weights, contexts)
        cuts = [w.reshape(1, len(w), c.taps, -1) for w, c in zip(weights, contexts, strict=True)]
        if self.allocation == "global":
            shares = one_threshold([self._pattern.scores(cut) for cut in cuts], self.share)
        else:
            shares = erdos_renyi_kernel([(cut.shape[1], cut.shape[3], cut.shape[2]) for cut in cuts], self.share)
        return [self._with(share) for share in shares]

    def _by_error(self, weights: Sequence[np.ndarray], contexts: Sequence[Context]) -> Sequence[Sparsify]:
        """Shares by what zeros cost on data; layers that no data reaches keep the common one."""
        size = sum(weight.size for weight in weights)
        if self.by_data and sum(int((weight == 0).sum()) for weight in weights) >= self.share * size - 0.5 * len(
            weights
        ):
            return [self._with(float((weight == 0).mean())) for weight in weights]  # pruned already: a file of training
        known = [number for number, context in enumerate(contexts) if context.gram is not None]
        if not self.by_data or not known:
            raise InputError(
                "cannot share zeros out by error", where="sparsify.allocation",
                expected="data, and all zeros from the first step", got="none" if self.by_data else "a gradual schedule",
                todo="Give attach data=, with a constant schedule from step 0; or take allocation global, erk or uniform",
            )  # fmt: skip
        points, curves = np.array([0.0, *SHARES]), []
        for number in known:
            weight, context, gram = weights[number], contexts[number], contexts[number].gram
            assert gram is not None
            scaled = (weight * _gain(weight, context)).reshape(gram.unfolding.shape)
            curves.append(self.curve(scaled, gram, points))
        parts = allocate([weights[number].size for number in known], points, np.stack(curves), self.share)
        found = [self] * len(weights)
        for number, part in zip(known, parts, strict=True):
            found[number] = self._with(float(part))
        return found

    def _with(self, share: float) -> Sparsify:
        """The same with a layer's own share."""
        share = float(np.clip(share, 1e-6, 1 - 1e-6))
        return replace(self, sparsity=share, initial=self.initial * share / self.share)

    def promises(self, weight: np.ndarray, context: Context) -> tuple[str, ...]:
        """The share of zeros, in whole blocks of the pattern or in each of its sets.

        >>> Sparsify(pattern="2:4").promises(np.array([[1.0, 2.0, 3.0, 0.0]], np.float32), Context("layer", axis=0))
        ('1 of 1 sets of 4 inputs has more than 2 weights',)
        """
        pattern, cut = self._pattern, weight.reshape(1, len(weight), context.taps, -1)
        if pattern.of:
            over, number = pattern.crowded(cut != 0)
            have = "has" if over == 1 else "have"
            text = f"{over} of {number} sets of {pattern.of} inputs {have} more than {pattern.keep} weights"
            return (text,) if over else ()
        power, counts = pattern.scores(cut)
        zeros = float(counts[power == 0].sum())
        half = counts.max() / 2 if counts.size else 0
        if zeros + half + 1e-6 * weight.size >= self.share * weight.size:
            return ()
        return (
            f"{100 * zeros / weight.size:.1f} % zeros in pattern {self.pattern or UNSTRUCTURED}, not {100 * self.share:.1f} %",
        )

    @property
    def _pattern(self) -> Pattern:
        return Pattern.parse(self.pattern or UNSTRUCTURED)


def _gain(weight: np.ndarray, context: Context) -> np.ndarray:
    """What outputs are multiplied with, float32 [outputs, 1]; 1 where that is nothing."""
    if context.gain is None:
        return np.ones((len(weight), 1), np.float32)
    gain = np.asarray(context.gain, np.float32).reshape(-1, 1)
    return np.where(np.abs(gain) > 1e-6, gain, np.float32(1.0))


@dataclass(frozen=True)
class Basis:
    """Second moments of inputs scaled to the same power, as eigenvalues and eigenvectors.

    Attributes:
      size: Root of each input's power [groups, 1, inputs].
      power: Eigenvalues, float32 [groups, 1, inputs].
      vectors: Eigenvectors in columns, float32 [groups, inputs, inputs].
    """

    size: np.ndarray
    power: np.ndarray
    vectors: np.ndarray


def basis(second: np.ndarray) -> Basis:
    """The basis of float64 H [groups, inputs, inputs]."""
    size = np.sqrt(np.einsum("gkk->gk", second))[:, None, :]
    values, vectors = np.linalg.eigh(second / size / np.swapaxes(size, -1, -2))
    return Basis(size, np.maximum(values, 0.0).astype(np.float32)[:, None, :], vectors.astype(np.float32))


def _steps(second: np.ndarray) -> int:
    return max(LEAST, min(STEPS, STEPS * WIDE // second.shape[-1]))


def search(wanted: np.ndarray, turned: Basis, choose: Choose, steps: int = STEPS) -> np.ndarray:
    """Which weights stay, so that those that stay can make good most of what the others did.

    Minimises (wanted - W) H (wanted - W)^T over W that is zero where the pattern says so: W and a copy D of it that has the
    pattern are drawn to each other ever more strongly (rho), each optimal given the other, with U adding up what they disagree
    about. Inputs are scaled to the same power first, so that a weight counts by what it does to the output. With H's
    eigenvectors each round is two products.

    Args:
      wanted: float [groups, rows, inputs].
      turned: That of H.
      choose: From scores (the shape of `wanted`) to which weights stay.
      steps: Rounds until the drawing is tight; the more, the better the choice.

    Returns:
      bool, the shape of `wanted`.

    >>> h = np.array([[[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 1.0]]])  # the first two inputs stand in for each other
    >>> search(np.array([[[1.0, 1.1, 1.2]]]), basis(h), lambda score: score >= np.sort(score)[..., [1]]).tolist()
    [[[False, True, True]]]
    """
    power, vectors = turned.power, turned.vectors
    back = np.ascontiguousarray(np.swapaxes(vectors, -1, -2))
    drawn = (wanted * turned.size).astype(np.float32)
    goal = (drawn @ vectors) * power
    duals, rho, kept, settled = np.zeros_like(drawn), LOOSE, np.zeros(drawn.shape, bool), 0
    growth = (TIGHT / LOOSE) ** (1 / steps)
    for _ in range(4 * steps):
        free = ((goal + rho * ((drawn - duals) @ vectors)) / (power + rho)) @ back
        duals += free
        before, kept = kept, choose(np.square(duals))
        drawn = duals * kept
        duals -= drawn
        settled = settled + 1 if np.array_equal(before, kept) else 0
        if settled == SETTLED:
            break
        rho *= growth
        duals /= np.float32(growth)
    return kept
