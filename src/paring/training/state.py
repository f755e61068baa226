"""What an attached model carries: one layer with every variable of it, and the recipe; it goes into the `.keras` file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

ASSET = "paring.json"
ATTRIBUTE = "paring_state"


class State(keras.layers.Layer):
    """Ranges, scales, masks, centroids and the counter of steps, by name.

    It is an attribute of the model, so that Keras saves it and trains its trainable variables; a file with it loads without
    paring, as the plain model. What is not trained is not among the model's `weights`, which stay those of the plain model.
    """

    def __init__(self) -> None:
        """Starts with the counter."""
        super().__init__(name=ATTRIBUTE, trainable=True)
        self.settings: dict[str, Any] = {}
        self.hidden = False
        self._named: dict[str, Any] = {}
        self.built = True

    def add(
        self, name: str, value: np.ndarray, *, trainable: bool = False, aggregation: str = "only_first_replica"
    ) -> Any:
        """A new variable; `aggregation` says what becomes of it where several replicas write it."""
        variable = self.add_weight(
            shape=value.shape, dtype=str(value.dtype), trainable=trainable, initializer=lambda *_, **__: value,
            name=name.replace("/", "."), aggregation="mean" if trainable else aggregation, autocast=False,
        )  # fmt: skip
        self._named[name] = variable
        return variable

    @property
    def named(self) -> Mapping[str, Any]:
        """The variables by name."""
        return self._named

    @property
    def weights(self) -> list[Any]:
        """The trained variables."""
        return [] if self.hidden else [v for v in self._named.values() if v.trainable]

    def save_own_variables(self, store: Any) -> None:
        """By name, so that a file can be held against the model."""
        for name, variable in self._named.items():
            store[name.replace("/", "|")] = np.asarray(keras.ops.convert_to_numpy(variable))

    def load_own_variables(self, store: Any) -> None:
        """The other way round.

        Raises:
          ValueError: A variable is missing: the file is of another model or recipe.
        """
        for name, variable in self._named.items():
            key = name.replace("/", "|")
            if key not in store:
                raise ValueError(f"{name} is not in the file: it was saved with another model or recipe")
            variable.assign(store[key])

    def save_assets(self, dir_path: str) -> None:
        """Writes the recipe."""
        Path(dir_path, ASSET).write_text(json.dumps(self.settings), encoding="utf-8")

    def load_assets(self, dir_path: str) -> None:
        """Nothing: the recipe was read before, to know which variables there are."""
