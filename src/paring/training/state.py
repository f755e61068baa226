"""What an attached model carries: one layer with every variable of it, and the recipe; it goes into the `.keras` file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

ASSET = "paring.json"
ATTRIBUTE = "paring_state"
_OPTIMIZER = "optimizer/"


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
        self.attachment: Any = None
        self._named: dict[str, Any] = {}
        self.built = True

    def add(
        self, name: str, value: np.ndarray, *, trainable: bool = False, aggregation: str = "only_first_replica"
    ) -> Any:
        """A new variable; `aggregation` says what becomes of it where several replicas write it."""
        plain = re.sub("[^A-Za-z0-9_]", "_", name)  # PyTorch takes no points; the number keeps them apart
        variable = self.add_weight(
            shape=value.shape, dtype=str(value.dtype), trainable=trainable, initializer=lambda *_, **__: value,
            name=f"{plain}_{len(self._named)}", aggregation="mean" if trainable else aggregation, autocast=False,
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

    @property
    def variables(self) -> list[Any]:
        """All of them; none while they are hidden."""
        return [] if self.hidden else list(super().variables)

    def hiding(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, for which nothing but the plain model's weights are there."""

        def hidden(*args: Any, **kwargs: Any) -> Any:
            before, self.hidden = self.hidden, True
            try:
                return function(*args, **kwargs)
            finally:
                self.hidden = before

        return hidden

    def save_own_variables(self, store: Any) -> None:
        """By name, so that a file can be held against the model; with random generators, whose state Keras leaves out."""
        for name, variable in self._stored().items():
            store[name.replace("/", "|")] = np.asarray(keras.ops.convert_to_numpy(variable))

    def load_own_variables(self, store: Any) -> None:
        """The other way round.

        Raises:
          ValueError: A variable is missing: the file is of another model or recipe.
        """
        for name, variable in self._stored().items():
            key = name.replace("/", "|")
            if key not in store:
                if name.startswith(_OPTIMIZER):  # the model was saved before it was compiled, or without its optimizer
                    continue
                raise ValueError(f"{name} is not in the file: it was saved with another model or recipe")
            variable.assign(store[key])

    def _stored(self) -> dict[str, Any]:
        model = getattr(self.attachment, "model", None)
        layers = model._flatten_layers() if model is not None else ()
        generators = [g for layer in layers for g in getattr(layer, "_seed_generators", ())]
        optimizer = getattr(model, "optimizer", None)
        own = [v for v in optimizer.variables if ATTRIBUTE in v.path] if optimizer is not None else []
        found = {**self._named, **{f"random/{number}": g.state for number, g in enumerate(generators)}}
        return {**found, **{f"{_OPTIMIZER}{number}": v for number, v in enumerate(own)}}

    def save_assets(self, dir_path: str) -> None:
        """Writes the recipe."""
        Path(dir_path, ASSET).write_text(json.dumps(self.settings), encoding="utf-8")

    def load_assets(self, dir_path: str) -> None:
        """Nothing: the recipe was read before, to know which variables there are."""
