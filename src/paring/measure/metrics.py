"""What a model's outputs are worth: top1, top5, mse, cosine, auc, or a function of the user's."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from paring.errors import InputError, MetricError, ParingError
from paring.named import find

Outputs: TypeAlias = "np.ndarray | Mapping[str, np.ndarray]"
LABELS, TARGET, ANY = "labels", "target", "any"
_BLOCK = 1024  # rows at a time: outputs may be mapped from a file that is larger than memory


@dataclass(frozen=True)
class Metric:
    """How outputs are scored.

    Attributes:
      name: As the user gave it.
      unit: Unit of the score and of differences of scores; empty for a plain number.
      higher_is_better: Which way is better.
      wants: `labels`: labels and nothing else; `target`: labels of the output's size, else the first model's outputs;
        `any`: a user's function, which gets the labels there are.
      rate: (outputs, labels or target) -> one number, or one per sample, whose mean is the score.
    """

    name: str
    unit: str
    higher_is_better: bool
    wants: str
    rate: Callable[[Any, Any], Any]

    def score(self, outputs: Outputs, labels: np.ndarray | None = None, reference: Outputs | None = None) -> float:
        """The score of a model; the arguments are those of `measure`."""
        return self.measure(outputs, labels, reference)[0]

    def values(
        self, outputs: Outputs, labels: np.ndarray | None = None, reference: Outputs | None = None
    ) -> np.ndarray | None:
        """float64 [n]: the score of each sample, None where a metric has none; the arguments are those of `measure`."""
        return self.measure(outputs, labels, reference)[1]

    def measure(
        self, outputs: Outputs, labels: np.ndarray | None = None, reference: Outputs | None = None, model: str = ""
    ) -> tuple[float, np.ndarray | None]:
        """Score and values in one go, for what takes long.

        Args:
          outputs: Real numbers [n, ...], or several outputs by name; all but a user's function look at the first.
          labels: [n, ...] or None.
          reference: The first model's outputs, for what has no labels to go by.
          model: What errors call the model.

        Raises:
          InputError: Labels are missing or do not fit.
          MetricError: The user's function raised, or gave no number.

        >>> find_metric("top1").measure(np.array([[0.1, 0.9], [0.8, 0.2]]), np.array([1, 1]))
        (50.0, array([100.,   0.]))
        """
        if self.wants == ANY:
            several = isinstance(outputs, Mapping) and len(outputs) > 1
            given = outputs if several or not isinstance(outputs, Mapping) else _first(outputs)
            found = _called(self, given, labels, model)
        else:
            first = _first(outputs)
            found = self.rate(first, self._against(first, labels, reference, model))
        values = np.asarray(found, np.float64)
        return (float(values.mean()), values) if values.ndim else (float(values), None)

    def drop(self, before: float, after: float) -> float:
        """By how much `after` is worse than `before`, in the metric's unit; negative where it is better."""
        return before - after if self.higher_is_better else after - before

    def uses_labels(self, outputs: Outputs, labels: np.ndarray | None) -> bool:
        """True where the score is taken against labels, not against the first model."""
        return labels is not None and (self.wants != TARGET or labels.size == _first(outputs).size)

    def _against(
        self, outputs: np.ndarray, labels: np.ndarray | None, reference: Outputs | None, model: str
    ) -> np.ndarray:
        if self.uses_labels(outputs, labels) and labels is not None:
            if labels.shape[:1] != outputs.shape[:1]:
                got = f"{len(labels)} labels for {len(outputs)} outputs"
                raise InputError(
                    f"{self.name} cannot be measured", where=model or None, expected="a label for each", got=got
                )
            return labels
        if self.wants == LABELS:
            raise InputError(
                f"{self.name} needs labels",
                todo="Give them with --labels (.npy), or as the key `labels` of the .npz; mse and cosine need none",
            )
        target = None if reference is None else _first(reference)
        if target is None or target.shape != outputs.shape:
            got = "none" if target is None else f"{list(target.shape)} for {list(outputs.shape)}"
            raise InputError(
                f"{self.name} has nothing to compare with", where=model or None,
                expected="outputs of the first model's shape", got=got,
            )  # fmt: skip
        return target


def find_metric(text: str) -> Metric:
    """The metric of this name, or a function of the user's.

    Args:
      text: `top1`, `top5`, `mse`, `cosine`, `auc`; or `module:function`, imported from the working folder too and called
        with `(outputs, labels)`: real numbers [n, ...] (several outputs: a dict by name) and labels [n, ...] or None.
        It returns one number, or [n] numbers, whose mean is the score. Higher is better, unless the function has an
        attribute `lower_is_better = True`.

    Raises:
      InputError: There is no such metric or function.

    >>> find_metric("mse").higher_is_better
    False
    >>> find_metric("top2")
    Traceback (most recent call last):
    paring.errors.InputError: no such metric for top2: expected top1, top5, mse, cosine, auc or module:function. \
Did you mean top5?
    """
    if text in METRICS:
        return METRICS[text]
    if ":" not in text:
        near = difflib.get_close_matches(text, METRICS, 1, 0.5)
        expected = f"{', '.join(METRICS)} or module:function"
        todo = f"Did you mean {near[-1]}?" if near else None
        raise InputError("no such metric", where=text, expected=expected, todo=todo)
    function = find(text)
    if not callable(function):
        raise InputError("no such metric", where=text, expected="a function", got=type(function).__name__)
    return Metric(text, "", not getattr(function, "lower_is_better", False), ANY, function)


def default_metric(outputs: Outputs, labels: np.ndarray | None) -> Metric:
    """top1 where every output row has a class number for its label, else mse.

    >>> default_metric(np.zeros((2, 10)), np.array([3, 4])).name, default_metric(np.zeros((2, 10)), None).name
    ('top1', 'mse')
    """
    scores = _first(outputs)
    if labels is None or scores.ndim < 2 or scores.shape[-1] < 2 or labels.size != scores.size // scores.shape[-1]:
        return METRICS["mse"]
    whole = labels.dtype.kind in "iu" and labels.size and labels.min() >= 0 and labels.max() < scores.shape[-1]
    return METRICS["top1" if whole else "mse"]


def _first(outputs: Outputs) -> np.ndarray:
    return next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs


def _called(metric: Metric, outputs: Any, labels: np.ndarray | None, model: str) -> Any:
    """What the user's function gives, as a number or one per sample."""
    try:
        found = metric.rate(outputs, labels)
    except ParingError:
        raise
    except (Exception, SystemExit) as error:
        trace = error.__traceback__.tb_next if error.__traceback__ is not None else None
        raise MetricError(
            "the metric failed", where=" on ".join(filter(None, (metric.name, model))),
            got=f"{type(error).__name__}: {error}",
            detail="".join(traceback.format_exception(type(error), error, trace)),
        ) from error  # fmt: skip
    count = len(_first(outputs))
    try:
        values = None if found is None else np.asarray(found, np.float64)
    except (TypeError, ValueError):
        values = None
    if values is None or values.shape not in ((), (count,)):
        got = type(found).__name__ if values is None or not values.ndim else f"an array of {list(values.shape)}"
        raise MetricError(
            "the metric gives no score", where=" on ".join(filter(None, (metric.name, model))),
            expected=f"a number, or {count} of them", got=got,
        )  # fmt: skip
    return values


# -- the metrics ---------------------------------------------------------------------------------------------------


def _top(count: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """100 where the right class is among the `count` largest; of equal scores the lower class comes first."""

    def rate(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        name, classes = f"top{count}", outputs.shape[-1] if outputs.ndim > 1 else 1
        if classes <= count:
            todo = "For a yes or no take auc" if count == 1 else "Take top1"
            raise InputError(
                f"{name} cannot be measured", expected=f"more than {count} classes in the output's last dimension",
                got=f"an output of {list(outputs.shape)}", todo=todo,
            )  # fmt: skip
        if labels.size != outputs.size // classes:
            raise InputError(
                f"{name} cannot be measured", expected=f"a class number for each row of {list(outputs.shape)}",
                got=f"labels of {list(labels.shape)}",
            )  # fmt: skip
        wanted = _class_numbers(labels, classes, name).reshape(len(outputs), -1, 1)
        found = np.empty(len(outputs))
        for start in range(0, len(outputs), _BLOCK):
            scores = np.asarray(outputs[start : start + _BLOCK]).reshape(-1, wanted.shape[1], classes)
            right = wanted[start : start + _BLOCK]
            own = np.take_along_axis(scores, right, -1)
            # Not-a-number is below nothing: it counts as ahead of every class, and is itself behind all.
            ahead = ~(scores <= own) | ((scores == own) & (np.arange(classes) < right))
            found[start : start + _BLOCK] = 100.0 * (ahead.sum(-1) < count).mean(-1)
        return found

    return rate


def _class_numbers(labels: np.ndarray, classes: int, name: str) -> np.ndarray:
    numbers = labels.astype(np.int64) if labels.dtype.kind in "iufb" else np.full(labels.shape, -1)
    wrong = (numbers != labels) | (numbers < 0) | (numbers >= classes)
    if wrong.any():
        raise InputError(
            f"{name} cannot be measured", expected=f"labels that are class numbers from 0 to {classes - 1}",
            got=str(labels[wrong].reshape(-1)[0]),
        )  # fmt: skip
    return numbers


def _mse(outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Mean square difference of each sample."""
    return _by_rows(outputs, target, lambda a, b: np.square(a - b).mean(-1))


def _cosine(outputs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Cosine of the angle of each sample; 1 where both are zero, 0 where one is."""

    def rate(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        both = ~(a.any(-1) | b.any(-1))
        return np.where(both, 1.0, (a * b).sum(-1) / np.where(lengths > 0, lengths, 1.0))

    return _by_rows(outputs, target, rate)


def _by_rows(outputs: np.ndarray, target: np.ndarray, rate: Callable[[Any, Any], np.ndarray]) -> np.ndarray:
    found = np.empty(len(outputs))
    for start in range(0, len(outputs), _BLOCK):
        a, b = (np.asarray(part[start : start + _BLOCK], np.float64) for part in (outputs, target))
        found[start : start + _BLOCK] = rate(a.reshape(len(a), -1), b.reshape(len(a), -1))
    return found


def _auc(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Area under the receiver's curve; several classes: the mean over each against the rest."""
    scores = np.asarray(outputs, np.float64).reshape(len(outputs), -1)
    if labels.shape == scores.shape and scores.shape[1] > 1:
        right = labels != 0
    else:
        if labels.size != len(scores):
            got = f"labels of {list(labels.shape)} for outputs of {list(outputs.shape)}"
            raise InputError("auc cannot be measured", expected="one label for each output row", got=got)
        scores = scores[:, 1:] if scores.shape[1] == 2 else scores
        numbers = _class_numbers(labels.reshape(-1), max(2, scores.shape[1]), "auc")
        right = numbers[:, None] == (np.arange(scores.shape[1]) if scores.shape[1] > 1 else [1])
    areas = [_area(scores[:, c], right[:, c]) for c in range(scores.shape[1]) if 0 < right[:, c].sum() < len(right)]
    if not areas:
        raise InputError("auc cannot be measured", expected="labels of both kinds", got="one kind only")
    return 100.0 * float(np.mean(areas))


def _area(scores: np.ndarray, right: np.ndarray) -> float:
    """Share of the pairs of a right and a wrong sample in which the right one scores more; equal scores count half."""
    if np.isnan(scores).any():
        return float("nan")
    ordered = np.sort(scores[~right])
    below = np.searchsorted(ordered, scores[right], "left") + np.searchsorted(ordered, scores[right], "right")
    return float(below.mean() / (2 * len(ordered)))


METRICS = {
    "top1": Metric("top1", "points", True, LABELS, _top(1)),
    "top5": Metric("top5", "points", True, LABELS, _top(5)),
    "mse": Metric("mse", "", False, TARGET, _mse),
    "cosine": Metric("cosine", "", True, TARGET, _cosine),
    "auc": Metric("auc", "points", True, LABELS, _auc),
}

__all__ = ["METRICS", "Metric", "default_metric", "find_metric"]
