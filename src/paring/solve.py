"""Numbers for a plan: ranges become grids, weights become codes, biases follow; the result is a list of solved edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from paring.calibration import HISTOGRAM, MOMENTS, RANGE, Statistics, TensorStatistics
from paring.compress.base import Context, Encoded, Moments, per_input
from paring.compress.gram import Gram
from paring.compress.quantize import Quantize
from paring.compress.unfold import Unfolding
from paring.compress.weights import encode, real
from paring.decision import DYNAMIC, STATIC, WEIGHT_ONLY, Decision, Plan
from paring.edits import Edit, Port
from paring.errors import InputError
from paring.graph import Op, OpId, Quantization, Tensor, TensorId, Weight, WeightUse
from paring.grids import Grids, Propagation, activation_grid
from paring.loops import inner
from paring.plan import activation_input
from paring.state import kept, wide

_ASYMMETRIC = (
    "FULLY_CONNECTED", "BATCH_MATMUL", "SVDF", "RNN", "UNIDIRECTIONAL_SEQUENCE_RNN", "BIDIRECTIONAL_SEQUENCE_RNN",
    "LSTM", "UNIDIRECTIONAL_SEQUENCE_LSTM", "BIDIRECTIONAL_SEQUENCE_LSTM",
)  # fmt: skip
BIAS_MAX = (2**31 - 1) // 2


@dataclass(frozen=True)
class Solution:
    """Solved edits, in operator order, and the grids of the graph's borders.

    Attributes:
      edits: One for each operator that changes.
      borders: Grid of each graph input and output (of loop and branch bodies too) that is integer from now on.
      notes: What had to be given up, by operator name.
      beyond: Operators that no static kernel can serve, found while solving, with the reason.
    """

    edits: tuple[Edit, ...]
    borders: Mapping[TensorId, Quantization] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    beyond: Mapping[OpId, str] = field(default_factory=dict)


def requests(plan: Plan) -> dict[TensorId, set[str]]:
    """The statistics that solving will ask for, by tensor; empty where the recipe needs no data."""
    wanted: dict[TensorId, set[str]] = {}
    settings = {d.op.id: d.settings for d in plan.decisions}
    for dtype in ("int8", "int16"):
        spread = Propagation(plan, dtype)
        for node in spread.owners():
            if node in spread.carried or spread.tables(node):
                continue
            how = {
                s.range for op in (*spread.makers.get(node, ()), *spread.users.get(node, ())) if (s := settings[op.id])
            }
            for tensor in spread.members(node):
                if plan.graph.tensors[tensor].weight is None:
                    wanted.setdefault(tensor, set()).update({RANGE, HISTOGRAM} if how - {"minmax"} else {RANGE})
    for decision in plan.decisions:
        for use in decision.op.demands.state if decision.op.demands and decision.mode == STATIC else ():
            state = decision.op.inputs[use.input] if use.input is not None else None
            if state is not None and use.grid in ("cell", "range"):
                wanted.setdefault(state, set()).add(RANGE)
        source = activation_input(plan.graph, decision.op)
        asked = decision.settings
        if source is None or asked is None or decision.mode not in (STATIC, DYNAMIC, WEIGHT_ONLY):
            continue
        if decision.mode != WEIGHT_ONLY or _wants_moments(asked):
            wanted.setdefault(source, set()).add(MOMENTS)
    return wanted


def _wants_moments(settings: Quantize) -> bool:
    return settings.weights in ("int8", "int4") and (settings.bias_correction or settings.range == "mse")


class Inputs(Protocol):
    """Gives the moments of what an operator reads behind the edits so far: `paring.replay.Replay`."""

    def gram(
        self,
        op: Op,
        unfolding: Unfolding,
        edits: Sequence[Edit],
        borders: Mapping[TensorId, Quantization],
        grid: Quantization | None,
    ) -> Gram | None:
        """None where they cannot be had."""


def solve(plan: Plan, statistics: Statistics | None, inputs: Inputs | None = None) -> Solution:
    """Turns decisions into edits.

    Args:
      plan: What each operator becomes.
      statistics: Those of `requests(plan)`; None where a recipe can do without.
      inputs: Where weights are rounded by data, what they meet; without it they are rounded to nearest.

    Raises:
      InputError: A static operator's tensor has no statistics, or a weight is not finite.
    """
    return _Solver(plan, statistics, inputs).run()


class _Solver:
    def __init__(self, plan: Plan, statistics: Statistics | None, inputs: Inputs | None) -> None:
        self.plan, self.graph, self.inputs = plan, plan.graph, inputs
        self.edits: list[Edit] = []
        self.bordering: Mapping[TensorId, Quantization] = {}
        self.grams: dict[tuple[OpId, int], Gram | None] = {}
        self.statistics = statistics.tensors if statistics is not None else {}
        self.notes: dict[str, str] = {}
        self.beyond: dict[OpId, str] = {}
        self.encoded: dict[tuple[Any, Quantize, int | None], Encoded] = {}

    def run(self) -> Solution:
        grids = {dtype: self.grids(dtype) for dtype in ("int8", "int16")}
        self.bordering = self.borders(grids)
        # Loops and branches first: the borders of their bodies are integer from the first edit on.
        for decision in sorted(self.plan.decisions, key=lambda d: not d.op.ties):
            if decision.mode == STATIC and decision.activations:
                self.edits.append(self.static(decision, grids[decision.activations]))
            elif decision.mode in (DYNAMIC, WEIGHT_ONLY):
                self.edits.append(self.weights_only(decision))
        place = {d.op.id: number for number, d in enumerate(self.plan.decisions)}
        edits = sorted(self.edits, key=lambda edit: place[edit.op])
        return Solution(tuple(edits), self.bordering, self.notes, self.beyond)

    # -- activations ---------------------------------------------------------------------------------------------

    def grids(self, dtype: str) -> Grids:
        spread = Propagation(self.plan, dtype)
        by_op = {d.op.id: d.settings for d in self.plan.decisions}
        ranges: dict[TensorId, tuple[float, float]] = {}
        for node in spread.owners():
            if node in spread.carried:
                continue
            if tables := spread.tables(node):
                ranges[node] = _span(tables)
                continue
            found: TensorStatistics | None = None
            for tensor in spread.members(node):
                one = self.statistics.get(tensor)
                if one is not None:
                    found = one if found is None else found.merge(one)
            if found is None or not found.count:
                raise InputError(
                    "no calibration statistics",
                    where=f"tensor {self.graph.tensors[node].name}",
                    todo="Give data that reaches it (--data), or leave its operators float",
                )
            if not np.isfinite([found.low, found.high]).all():
                raise InputError(
                    "cannot calibrate", where=f"tensor {self.graph.tensors[node].name}", expected="finite values",
                    got=f"[{found.low}, {found.high}]", todo="Check the data's range, or skip the operator (--skip)",
                )  # fmt: skip
            users = [by_op[op.id] for op in (*spread.makers.get(node, ()), *spread.users.get(node, ()))]
            how = next((s for s in users if s is not None and s.range != "minmax"), None)
            levels = 256 if dtype == "int8" else 65536
            ranges[node] = found.range(how.range, how.percentile, levels) if how else (found.low, found.high)
        return spread.solve(ranges)

    def borders(self, grids: Mapping[str, Grids]) -> dict[TensorId, Quantization]:
        """Grids of model inputs and outputs where the recipe wants them integer, and of the bodies of static loops."""
        found: dict[TensorId, Quantization] = {}
        recipe = self.plan.recipe
        for ports, wanted in ((self.graph.inputs, recipe.inputs), (self.graph.outputs, recipe.outputs)):
            for tensor in ports if wanted != "float32" else ():
                form = "int16" if wanted == "int16" else "int8"
                grid = grids[form].written.get((tensor, form))
                if grid is not None:
                    shifted = Quantization(grid.scale, grid.zero_point + 128, "uint8")
                    found[tensor] = shifted if wanted == "uint8" else grid
        for decision in self.plan.decisions:
            if decision.mode == STATIC and decision.activations:
                carried = grids[decision.activations].carried
                names = {t for tie in decision.op.ties for t in inner(decision.op, tie)}
                found |= {tensor: carried[tensor] for tensor in names}
        return found

    def static(self, decision: Decision, grids: Grids) -> Edit:
        op, settings = decision.op, decision.settings
        assert op.demands is not None and settings is not None
        dtype = settings.activations
        inputs: dict[int, Port] = {}
        for index in op.demands.data:
            tensor = op.inputs[index]
            if tensor is None:
                continue
            constant = self.graph.tensors[tensor].weight
            if constant is not None:
                inputs[index] = self.operand(constant, grids.read.get((op.id, index)), dtype)
            else:
                inputs[index] = Port(grids.read[op.id, index])
        source = op.inputs[op.demands.data[0]] if op.demands.data else None
        first = inputs[op.demands.data[0]].grid if source is not None else None
        scale = first.scale if first is not None else None
        outputs = {i: Port(grids.written[op.outputs[i], dtype]) for i in op.demands.results}
        state: tuple[Quantization, ...] = ()
        if op.demands.state:
            found = kept(self.graph, op, self.statistics, grids.written[op.outputs[op.demands.results[0]], dtype])
            state = found.grids
            self.notes.update({op.name: found.note} if found.note else {})
            self.beyond.update({op.id: found.beyond} if found.beyond else {})
        for use, stored in self.graph.weights_of(op):
            assert stored.weight is not None
            if op.demands.same:  # a table whose codes are looked up as they are
                inputs[use.input] = self.operand(real(stored), outputs[op.demands.results[0]].grid, dtype)
                continue
            encoded = self.weight(decision, use, stored, first) if use.dtype == "int8" else wide(real(stored))
            met = scale if use.meets is None else state[use.meets].scale
            bias = self.bias(op, use.bias)
            if bias is not None and use.bias is not None and encoded.grid is not None and met is not None:
                bias_values = bias + self.correction(decision, use, stored, encoded)
                encoded, port = self.static_bias(encoded, bias_values, float(met[0]), dtype)
                inputs[use.bias] = port
            inputs[use.input] = Port(encoded.grid, encoded)
        for own, grid in zip(op.demands.state, state, strict=True):
            if own.input is not None:
                inputs[own.input] = Port(grid, state=True)
        unseen = tuple(grid for own, grid in zip(op.demands.state, state, strict=True) if own.input is None)
        params = _params(op, decision.form)
        return Edit(op.id, decision.form, self.version(decision), inputs, outputs, params, unseen)

    def operand(self, constant: Weight, grid: Quantization | None, dtype: str) -> Port:
        """A constant at an activation's place: on the operator's shared grid, or on its own range."""
        values = np.asarray(constant.read(), np.float32)
        grid = grid or activation_grid(*_widened(values), dtype)
        low, high = (-128, 127) if dtype == "int8" else (-32767, 32767)
        codes = _round_away(values.astype(np.float64) / float(grid.scale[0]) + int(grid.zero_point[0]))
        return Port(grid, Encoded(np.clip(codes, low, high).astype(dtype), dtype, grid))

    # -- weights -------------------------------------------------------------------------------------------------

    def weights_only(self, decision: Decision) -> Edit:
        op = decision.op
        assert op.demands is not None
        inputs: dict[int, Port] = {}
        for use, tensor in self.graph.weights_of(op):
            if tensor.weight is None or tensor.weight.dtype != "float32":
                continue
            encoded = self.weight(decision, use, tensor)
            inputs[use.input] = Port(encoded.grid, encoded, unpack=decision.mode == WEIGHT_ONLY)
            bias = self.bias(op, op.demands.bias)
            correction = self.correction(decision, use, tensor, encoded)
            # XNNPACK's dynamic kernels want the bias itself, not one behind DEQUANTIZE.
            if (
                bias is not None
                and op.demands.bias is not None
                and (np.any(correction) or self.unpacked_bias(decision))
            ):
                values = (bias + correction).astype(np.float32)
                inputs[op.demands.bias] = Port(None, Encoded(values, "float32", None))
        blocks = decision.form == "dynamic-int4-block"
        outputs = {}
        if decision.form == "codes-int8":  # what is looked up are codes; they are converted behind the operator
            outputs = {i: Port(inputs[op.demands.weights[0].input].grid) for i in op.demands.results}
        params = _params(op, decision.form)
        return Edit(op.id, decision.form, self.version(decision), inputs, outputs, params, unfuse=blocks)

    def version(self, decision: Decision) -> int:
        """The version of the form, unless the source's options already ask for a later one."""
        demands = decision.op.demands
        assert demands is not None
        return max(demands.versions.get(decision.form, 1), decision.op.version)

    def weight(self, decision: Decision, use: WeightUse, tensor: Tensor, read: Quantization | None = None) -> Encoded:
        """Codes of one weight; operators that share weight and settings share the codes, across subgraphs too."""
        settings, weight = decision.settings, real(tensor)
        assert settings is not None
        axis = use.axis if use.axis is None else use.axis % max(1, len(weight.shape))
        shared = weight.origin is not None and tensor.quantization is None
        key = ((weight.origin, weight.shape) if shared else tensor.id, replace(settings, activations="float"), axis)
        if key not in self.encoded:
            reduced = tuple(d % len(weight.shape) for d in use.reduced)
            gram = self.gram(decision, use, tensor, read)
            context = Context(
                decision.op.name, axis, reduced, self.moments(decision), tensor.quantization, gram,
                pruned=decision.op.id in self.plan.pruned,
            )  # fmt: skip
            try:
                self.encoded[key] = encode(settings, weight, context)
            except InputError as error:
                raise InputError(str(error).rstrip("."), where=f"layer {decision.op.name}") from error
            finally:
                weight.release()
        return self.encoded[key]

    def gram(self, decision: Decision, use: WeightUse, tensor: Tensor, read: Quantization | None) -> Gram | None:
        """Second moments of the rows that the weights meet, where rounding wants them."""
        settings, name = decision.settings, decision.op.name
        if settings is None or not settings.sequential or self.inputs is None:
            return None
        if tensor.quantization is not None:
            return None  # codes from elsewhere are kept
        unfolding = Unfolding.of(self.graph, decision.op, use)
        if unfolding is None:
            self.notes[name] = f"{settings.rounding} knows no {decision.op.native} of this form: rounded to nearest"
            return None
        found = self.inputs.gram(decision.op, unfolding, self.edits, self.bordering, read)
        if found is None:
            self.notes[name] = f"no finite sample reaches it, so it is rounded to nearest, not by {settings.rounding}"
            return None
        if settings.bias_correction and self.bias(decision.op, use.bias) is not None:
            found = found.centered()
        self.grams[decision.op.id, use.input] = found
        return found

    def moments(self, decision: Decision) -> Moments | None:
        source = activation_input(self.graph, decision.op)
        if source is None or decision.settings is None or not _wants_moments(decision.settings):
            return None
        found = self.statistics.get(source)
        moments = None if found is None else found.moments
        if moments is not None and not np.isfinite(moments.mean).all():
            raise InputError(
                "cannot calibrate", where=f"layer {decision.op.name}", expected="finite inputs",
                got="infinity or not-a-number", todo="Check the data's range, or skip the layer (--skip)",
            )  # fmt: skip
        return moments

    def bias(self, op: Op, index: int | None) -> np.ndarray | None:
        tensor = op.inputs[index] if index is not None and index < len(op.inputs) else None
        weight = self.graph.tensors[tensor].weight if tensor is not None else None
        return None if weight is None else np.asarray(weight.read(), np.float32)

    def unpacked_bias(self, decision: Decision) -> bool:
        demands = decision.op.demands
        tensor = decision.op.inputs[demands.bias] if demands is not None and demands.bias is not None else None
        weight = self.graph.tensors[tensor].weight if tensor is not None else None
        return decision.mode == DYNAMIC and weight is not None and weight.stored != "float32"

    def correction(self, decision: Decision, use: WeightUse, tensor: Tensor, encoded: Encoded) -> np.ndarray:
        """What rounding the weights shifted in the mean output, per channel (Nagel et al. 2019, section 4.2)."""
        settings, weight, moments = decision.settings, real(tensor), self.moments(decision)
        gram = self.grams.get((decision.op.id, use.input))
        if settings is not None and settings.bias_correction and gram is not None and use.axis is not None:
            return gram.shift(np.asarray(weight.read(), np.float32), settings.decode(encoded))
        axis = encoded.grid.axis if encoded.grid is not None else None
        if settings is None or not settings.bias_correction or weight is None or moments is None or use.axis is None:
            return np.float32(0)  # type: ignore[return-value]
        lost = np.asarray(weight.read(), np.float64) - settings.decode(encoded)
        mean = per_input(moments.mean, weight.shape, axis if axis is not None else use.axis, use.reduced)
        if mean is None:
            return np.float32(0)  # type: ignore[return-value]
        channel = use.axis % lost.ndim
        shift = (lost * mean).sum(axis=tuple(d for d in range(lost.ndim) if d != channel))
        if decision.op.kind == "conv2d_transpose":  # an output meets every stride-th position of the kernel only
            shift /= int(decision.op.params.get("stride_h", 1)) * int(decision.op.params.get("stride_w", 1))
        return np.asarray(shift, np.float32)

    def static_bias(self, encoded: Encoded, bias: np.ndarray, input_scale: float, dtype: str) -> tuple[Encoded, Port]:
        """Bias codes on the grid input scale x weight scale; a channel whose bias would overflow gets coarser weights."""
        grid = encoded.grid
        assert grid is not None
        wide = dtype == "int16"
        scale = (input_scale * grid.scale.astype(np.float64)).astype(np.float32)
        scale = np.broadcast_to(scale, (bias.size,)) if scale.size > 1 or bias.size == 1 else scale
        if not wide:
            size = np.abs(bias.astype(np.float64)).reshape(-1)
            if scale.size == 1:
                size = np.array([size.max(initial=0.0)])
            over = size / scale.astype(np.float64) > BIAS_MAX
            if over.any():
                scale = np.where(over, size / BIAS_MAX, scale).astype(np.float32)
                wider = np.where(over, scale / input_scale, grid.scale).astype(np.float32)
                encoded = _regrid(encoded, wider)
                assert encoded.grid is not None
        inverse = (1.0 / scale.astype(np.float64)).astype(np.float64 if wide else np.float32)
        limit = 2**62 if wide else 2**31 - 1
        codes = np.clip(_round_away(bias.reshape(-1) * inverse).astype(np.float64), -limit, limit)
        form = "int64" if wide else "int32"
        out = Quantization(
            scale.astype(np.float32), np.zeros(scale.shape, np.int64), form, 0 if scale.size > 1 else None
        )
        return encoded, Port(out, Encoded(codes.astype(form).reshape(bias.shape), form, out))


def _params(op: Op, form: str) -> dict[str, Any]:
    """Options that a form needs: run-time quantization with a zero point, int16 scales that are no powers of two."""
    params: dict[str, Any] = {}
    if form.startswith("dynamic") and op.native in _ASYMMETRIC:
        params["asymmetric_quantize_inputs"] = True
    if form == "int16" and op.native in ("ADD", "SUB"):
        params["pot_scale_int16"] = False
    return params


def _regrid(encoded: Encoded, scale: np.ndarray) -> Encoded:
    grid = encoded.grid
    assert grid is not None
    factor = (grid.scale.astype(np.float64) / scale).reshape(
        [-1 if d == grid.axis else 1 for d in range(encoded.values.ndim)]
    )
    codes = np.rint(encoded.values * factor).astype(encoded.values.dtype)
    return Encoded(codes, encoded.form, replace(grid, scale=scale))


def _span(tables: list[Weight]) -> tuple[float, float]:
    """The range of constants: of a whole table, for data shows only the rows it looks up."""
    low = high = 0.0
    for table in tables:
        values = np.asarray(table.read())
        low, high = min(low, float(values.min(initial=0.0))), max(high, float(values.max(initial=0.0)))
        table.release()
    return low, high


def _widened(values: np.ndarray) -> tuple[float, float]:
    low, high = min(float(values.min(initial=0.0)), 0.0), max(float(values.max(initial=0.0)), 0.0)
    return (low, high) if high - low > 1e-6 else (min(low, -5e-7), max(high, 5e-7))


def _round_away(values: np.ndarray) -> np.ndarray:
    """Half away from zero, as the converter rounds."""
    whole = np.trunc(values)
    return np.asarray(whole + np.where(np.abs(values - whole) >= 0.5, np.sign(values), 0))
