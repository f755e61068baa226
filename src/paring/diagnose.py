"""What is to be said against a plan: tensors that one grid drowns, kernels that cannot serve, samples that flatter."""

from __future__ import annotations

import numpy as np

from paring.calibration import Statistics
from paring.decision import STATIC, Plan
from paring.graph import OpId
from paring.plan import DROWNED
from paring.solve import Solution


def diagnose(plan: Plan, statistics: Statistics) -> list[tuple[str, float, float, float, tuple[str, ...]]]:
    """Tensors whose static grid leaves the median channel under `DROWNED`, worst first: the layers to exempt."""
    makers, users = plan.graph.producers(), plan.graph.consumers()
    static = {d.op.id for d in plan.decisions if d.mode == STATIC and d.activations == "int8"}
    found = []
    for tensor, s in statistics.tensors.items():
        level = s.channel_db(255)
        around = [makers[tensor]] if tensor in makers else []
        around += [op for op, _ in users.get(tensor, ())]
        around = [op for op in around if op.id in static]
        if level is not None and level < DROWNED and around:
            found.append((plan.graph.tensors[tensor].name, s.low, s.high, level, tuple(op.name for op in around)))
    return sorted(found, key=lambda f: f[3])


def unreachable(plan: Plan, solution: Solution) -> dict[OpId, str]:
    """Static operators whose ratio of scales the kernels cannot serve, with the reason: they have to stay float."""
    ops = {d.op.id: d.op for d in plan.decisions}
    found = dict(solution.beyond)
    for edit in solution.edits:
        demands = ops[edit.op].demands
        if demands is None or demands.rescale is None:
            continue
        of, low, high = demands.rescale
        ports = [edit.inputs[i].grid for i in sorted(edit.inputs) if i != demands.bias]
        scales = [float(g.scale.max()) for g in ports if g is not None]
        if of == "input" and edit.form == "int8" and min(scales) < low:
            found[edit.op] = (
                f"the kernel takes unlike codes for equal at this scale ({min(scales):.3g}, right from {low:.3g})"
            )
        if of == "input" or not edit.outputs:
            continue
        out = float(edit.outputs[min(edit.outputs)].grid.scale[0])  # type: ignore[union-attr]
        top = {"each": max(scales), "product": float(np.prod(scales)), "quotient": scales[0] / scales[-1]}[of]
        if not low <= top / out < high * (1 + 1e-6):
            bound = f"at least {low:g}" if top / out < low else f"below {high:g}"
            found[edit.op] = f"its scales are out of the kernels' reach (ratio {top / out:.3g}, right {bound})"
    return found


def fitted(plan: Plan) -> tuple[str, ...]:
    """What to say beside the difference of a model whose weights were rounded by the samples it is measured on."""
    found = {d.settings.rounding for d in plan.decisions if d.settings is not None and d.settings.sequential}
    said = (
        f"weights were rounded ({', '.join(sorted(found))}) so that these samples suffer least: on others the difference is "
        "larger, with few samples by far (paring bench --data measures on others)"
    )
    return (said,) if found else ()
