"""Algorithms that each break one rule of the contract, for `check_algorithm` to find; and a right one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from paring.compress import Algorithm, Encoded, Extra
from paring.compress.straight import through


@dataclass(frozen=True)
class Halves(Algorithm):
    """Right: weights rounded to multiples of a half."""

    unit: float = 0.5

    def encode(self, weight, context):
        return Encoded((np.rint(weight / self.unit) * self.unit).astype(np.float32), "float32", None)

    def decode(self, encoded):
        return encoded.values

    def project(self, ops, weight, variables, step, context):
        return through(ops, ops.round(weight / self.unit) * self.unit, weight)


class NoDataclass(Halves):
    """Without the decorator its settings are those of its base."""


@dataclass(frozen=True)
class Unwritable(Halves):
    unit: float = 0.5
    levels: tuple = (1.0, 2.0)  # a recipe gives back a list


@dataclass(frozen=True)
class Flat(Halves):
    def decode(self, encoded):
        return encoded.values.reshape(-1)


@dataclass(frozen=True)
class Double(Halves):
    def decode(self, encoded):
        return encoded.values.astype(np.float64)


@dataclass(frozen=True)
class InPlace(Halves):
    def encode(self, weight, context):
        weight *= 0.5
        return super().encode(weight, context)


@dataclass(frozen=True)
class Shrinking(Halves):
    def encode(self, weight, context):
        return Encoded(weight * np.float32(0.5), "float32", None)


@dataclass(frozen=True)
class Noisy(Halves):
    def encode(self, weight, context):
        noise = np.random.default_rng().integers(0, 2, weight.shape) * self.unit
        found = super().encode(weight, context).values
        return Encoded(found if (found == 0).all() else found + np.float32(noise), "float32", None)


@dataclass(frozen=True)
class Hungry(Halves):
    def encode(self, weight, context):
        whole = weight[..., None] * np.ones(20, np.float32)
        return super().encode(np.ascontiguousarray(whole[..., 0]), context)


@dataclass(frozen=True)
class Promising(Halves):
    makes: ClassVar = frozenset({"values"})

    def promises(self, weight, context):
        return ("no weight is 0",) if (weight == 0).any() else ()


@dataclass(frozen=True)
class Filling(Halves):
    """Moves zeros and does not say that it gives them up."""

    def encode(self, weight, context):
        return Encoded(super().encode(weight, context).values + np.float32(self.unit), "float32", None)


@dataclass(frozen=True)
class NoGradient(Halves):
    def project(self, ops, weight, variables, step, context):
        return ops.round(weight / self.unit) * self.unit


@dataclass(frozen=True)
class Idle(Halves):
    """Has a trained variable that it does not use."""

    def variables(self, weight, context):
        return {"idle": Extra(np.ones(3, np.float32), trainable=True)}


@dataclass(frozen=True)
class Otherwise(Halves):
    """Trains other weights than it encodes."""

    def project(self, ops, weight, variables, step, context):
        return through(ops, ops.round(weight / 0.3) * 0.3, weight)


@dataclass(frozen=True)
class Branching(Halves):
    """Asks for a value while it is compiled."""

    def project(self, ops, weight, variables, step, context):
        if float(step) > 3:
            return through(ops, ops.round(weight / self.unit) * self.unit, weight)
        return weight


@dataclass(frozen=True)
class Misnamed(Halves):
    def update(self, ops, weight, variables, step, context):
        return {"scale": ops.ones((1,))}
