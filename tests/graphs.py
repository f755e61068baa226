"""Hand-made graphs: planning and grids are tested with no format, no file and no runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from paring.graph import Demands, Graph, Op, Quantization, Tensor, TensorId, Weight, WeightUse

MOVING = {"float": 1, "int8": 1, "int16": 1}
DENSE = Demands(
    data=(0,),
    weights=(WeightUse(1, 0, (1,)),),
    bias=2,
    results=(0,),
    versions={
        **MOVING, "dynamic-int8": 1, "dynamic-int4": 1, "dynamic-int4-block": 1, "int8-int4": 1, "int16-int4": 1,
    },
)  # fmt: skip
CONV = replace(
    DENSE,
    weights=(WeightUse(1, 0, (1, 2, 3)),),
    versions={**MOVING, "dynamic-int8": 1, "dynamic-int4": 1, "int8-int4": 1},
)
DEPTHWISE = replace(DENSE, weights=(WeightUse(1, 3, (0, 1, 2)),), versions=MOVING)
SOFTMAX = Demands(data=(0,), results=(0,), fixed={"int8": (1 / 256, -128), "int16": (1 / 32768, 0)}, versions=MOVING)
PAIR = Demands(data=(0, 1), results=(0,), versions=MOVING)
SAME = Demands(data=(0,), results=(0,), same=True, versions=MOVING)
MOVE = replace(SAME, computes=False)
JOIN = replace(MOVE, data=(0, 1))


def grid(scale: float, zero: int = 0, dtype: str = "int8") -> Quantization:
    return Quantization(np.array([scale], np.float32), np.array([zero], np.int64), dtype)


def weight(values: Any, stored: str = "float32", stored_bytes: int = 0) -> Weight:
    array = np.asarray(values)

    def read(start: int, stop: int) -> np.ndarray:
        return array[start:stop] if array.ndim else array

    return Weight(array.shape, str(array.dtype), stored, stored_bytes or array.nbytes, read)


class Sketch:
    """A graph under construction, one subgraph; tensors are known by their id."""

    def __init__(self) -> None:
        self.tensors: dict[TensorId, Tensor] = {}
        self.ops: list[Op] = []

    def tensor(self, name: str = "", shape: Sequence[int] = (1, 64), dtype: str = "float32", **more: Any) -> TensorId:
        key = (more.pop("scope", 0), len(self.tensors))
        self.tensors[key] = Tensor(key, name or f"t{key[1]}", tuple(shape), dtype, **more)
        return key

    def constant(self, *shape: int, stored: str = "float32", dtype: str = "float32", **more: Any) -> TensorId:
        return self.tensor("constant", shape, dtype, weight=weight(np.zeros(shape, dtype), stored), **more)

    def op(
        self,
        name: str,
        native: str,
        inputs: Sequence[TensorId | None],
        demands: Demands | None,
        *,
        kind: str = "",
        shape: Sequence[int] = (1, 64),
        dtype: str = "float32",
        outputs: int = 1,
        scope: int = 0,
        constant: bool = False,
    ) -> TensorId:
        """Adds an operator -> its first result."""
        made = [self.tensor(name, shape, dtype, scope=scope) for _ in range(outputs)]
        op_id = (scope, len(self.ops))
        self.ops.append(
            Op(op_id, name, kind or native.lower(), native, tuple(inputs), tuple(made), {}, demands, constant=constant)
        )
        return made[0]

    def dense(
        self, name: str, source: TensorId, shape: Sequence[int] = (64, 64), stored: str = "float32", **more: Any
    ) -> TensorId:
        inputs = [source, self.constant(*shape, stored=stored), self.constant(shape[0])]
        return self.op(name, "FULLY_CONNECTED", inputs, DENSE, kind="dense", **more)

    def conv(self, name: str, source: TensorId, shape: Sequence[int] = (16, 3, 3, 16), **more: Any) -> TensorId:
        return self.op(
            name, "CONV_2D", [source, self.constant(*shape), self.constant(shape[0])], CONV, kind="conv2d", **more
        )

    def finish(self, inputs: Sequence[TensorId] = (), outputs: Sequence[TensorId] = ()) -> Graph:
        return Graph(tuple(self.ops), self.tensors, tuple(inputs), tuple(outputs))


def with_grids(graph: Graph, grids: Mapping[TensorId, Quantization]) -> Graph:
    """The graph with grids carried by some tensors."""
    return replace(
        graph, tensors={k: replace(t, quantization=grids.get(k, t.quantization)) for k, t in graph.tensors.items()}
    )
