"""Made-up results of measuring, plausible and of any size, for tests of what shows them."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from paring.measure.result import (
    AlgorithmBench,
    AlgorithmRow,
    AlgorithmRun,
    AlgorithmTable,
    Candidate,
    Comparison,
    Error,
    Histogram,
    Layer,
    Sensitivity,
    Tuning,
)

RECIPE = {
    "version": 1,
    "name": "mixed",
    "description": "int8, projections in int4",
    "rules": [
        {"kind": "*", "apply": {"quantize": {"weights": "int8", "activations": "int8", "range": "mse"}}},
        {"kind": "conv2d", "name": "project", "apply": {"quantize": {"weights": "int4", "activations": "int8"}}},
        {"kind": "softmax", "apply": "float", "optional": True},
    ],
    "skip": ["^logits$"],
}


def as_results(command: str, key: str, value: Any) -> dict[str, Any]:
    """The dict of a results.json: through JSON, null where a float is not finite."""

    def finite(item: Any) -> Any:
        if isinstance(item, dict):
            return {k: finite(v) for k, v in item.items()}
        if isinstance(item, (list, tuple)):
            return [finite(v) for v in item]
        return None if isinstance(item, float) and not math.isfinite(item) else item

    machine = {"python": "3.11.7", "runtime": "ai-edge-litert 2.1.0", "processor": "x86_64", "threads": 1}
    data = {"paring": "0.1.0", "command": command, "environment": machine, key: finite(asdict(value))}
    return json.loads(json.dumps(data, allow_nan=False))


def histogram(rng: np.random.Generator, *, relu: bool, bits: int, width: float = 1.0, wrong: float = 1.0) -> Histogram:
    """Of a bell of values, cut at zero by `relu`; the grid holds `wrong` times what it should."""
    values = rng.standard_t(6, 20_000) * width
    values = np.maximum(values, 0) if relu else values
    counts, edges = np.histogram(values, 64)
    top = float(np.abs(values).max()) * wrong
    low = 0.0 if relu else -top
    levels = 2**bits - 1 if relu else 2**bits - 2
    return Histogram(float(edges[0]), float(edges[-1]), tuple(map(int, counts)), (top - low) / levels, (low, top))


def layers(count: int, seed: int = 3) -> tuple[Layer, ...]:
    """Inverted residual blocks, a pyramid with a concatenation, a classifier; one layer is bad."""
    rng = np.random.default_rng(seed)
    plan: list[tuple[str, str, tuple[int, ...]]] = [("stem/Conv2D", "CONV_2D", ())]
    block = 0
    while len(plan) < count - 15:
        start, block = len(plan) - 1, block + 1
        plan.append((f"block_{block}/expand/Conv2D", "CONV_2D", (start,)))
        plan.append((f"block_{block}/depthwise/depthwise", "DEPTHWISE_CONV_2D", (len(plan) - 1,)))
        if block % 4 == 0:
            plan.append((f"block_{block}/squeeze/Mean", "MEAN", (len(plan) - 1,)))
            plan.append((f"block_{block}/squeeze/Sigmoid", "LOGISTIC", (len(plan) - 1,)))
            plan.append((f"block_{block}/squeeze/Mul", "MUL", (len(plan) - 3, len(plan) - 1)))
        plan.append((f"block_{block}/project/Conv2D", "CONV_2D", (len(plan) - 1,)))
        if block % 3:
            plan.append((f"block_{block}/add/Add", "ADD", (start, len(plan) - 1)))
    trunk = len(plan) - 1
    for branch in range(3):
        plan.append((f"pyramid/branch_{branch}/Conv2D;pyramid/branch_{branch}/Relu", "CONV_2D", (trunk,)))
    plan.append(("pyramid/concat", "CONCATENATION", (trunk, *range(trunk + 1, trunk + 4))))
    plan.append(("head/Conv2D", "CONV_2D", (len(plan) - 1,)))
    plan.append(("pool/Mean", "MEAN", (len(plan) - 1,)))
    plan.append(("logits", "FULLY_CONNECTED", (len(plan) - 1,)))
    plan.append(("probabilities", "SOFTMAX", (len(plan) - 1,)))
    plan += [(f"copy_{i}", "RESHAPE", (len(plan) - 1,)) for i in range(count - len(plan))]
    bad = count * 2 // 5
    while plan[bad][1] != "DEPTHWISE_CONV_2D":
        bad += 1
    noise, made = 0.0, []
    for i, (name, native, inputs) in enumerate(plan):
        int4 = "project" in name
        plain = native in ("RESHAPE",)
        own = 4.7 if i == bad else float(rng.normal(24 if int4 else 41, 3.5))
        noise += 10 ** (-own / 10) * (1.0 if i == bad else 0.06) if not plain else 0.0
        accumulated = -10 * math.log10(noise) + float(rng.normal(0, 0.8))
        weighted = native in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
        relu = native in ("CONV_2D", "DEPTHWISE_CONV_2D") and not int4
        floating = native == "SOFTMAX"
        own_error = Error(
            own, own - 0.9, 1 - 0.5 * 10 ** (-own / 10), 0.083 * 10 ** ((44 - own) / 20), 0.0005 * (i % 3)
        )
        if plain or floating:
            own_error = Error(math.inf, math.inf, 1.0)
        made.append(
            Layer(
                name=name,
                native=native,
                optimized="" if native == "LOGISTIC" else name.split(";")[0],
                matched="" if native == "LOGISTIC" else "structure" if i % 5 else "name",
                form="" if native == "LOGISTIC" else "float32" if floating else "int8 x int4" if int4 else "int8",
                shape=(-1, 14, 14, 96) if weighted else (-1, 96),
                inputs=inputs,
                own=None if native == "LOGISTIC" else own_error,
                accumulated=None if native == "LOGISTIC" else Error(accumulated, accumulated - 1.2, 0.9991, 0.4, 0.001),
                blame=None if native == "LOGISTIC" else math.inf if plain or floating else own + 0.3,
                activation=histogram(rng, relu=relu, bits=8, width=2.0, wrong=0.35 if i == bad else 1.0),
                weights=histogram(rng, relu=False, bits=4 if int4 else 8, width=0.2) if weighted else None,
                weight_db=(22.0 if int4 else 44.0) + float(rng.normal(0, 2)) if weighted else None,
                rule=None if name == "logits" else 2 if floating else 1 if int4 else 0,
                note="folded into the multiplication that reads it" if native == "LOGISTIC" else "",
            )
        )
    return tuple(made)


def comparison(count: int = 200) -> Comparison:
    """A network of so many layers, in which one depthwise convolution is to blame."""
    found = layers(count)
    ranked = [i for i in range(count) if found[i].blame is not None]
    ranked.sort(key=lambda i: found[i].blame or 0.0)
    worst = found[ranked[0]].name
    return Comparison(
        source="models/mobilenet_float.tflite",
        optimized="models/mobilenet_mixed.tflite",
        samples=128,
        given=True,
        layers=found,
        ranking=tuple(ranked),
        outputs={"probabilities": Error(9.8, 8.9, 0.947, None, None)},
        agreement={"probabilities": 0.8516},
        recipe=RECIPE,
        exempt=f"- name: ^{worst}$\n  apply: float\n",
        unmatched=("tfl.quantize", "tfl.dequantize"),
        notes=("2 operators of the optimized model only convert between integers and floats",),
    )


def tuning() -> Tuning:
    """A search over 24 candidates: a front of six, one chosen, one that failed badly."""
    rng = np.random.default_rng(5)
    before = Candidate("float32", 312_440, 0.8712, 0.0, {}, latency_ms=1.92)
    found = []
    for i in range(24):
        share = i / 23
        size = int(312_440 / (2.0 + 4.4 * share + rng.uniform(-0.2, 0.2)))
        drop = 0.0006 + 0.031 * share**4 + abs(rng.normal(0, 0.003))
        recipe = {**RECIPE, "name": f"candidate-{i}"}
        label = "everything float16" if i == 0 else f"int4 on {i} of 24 layers, int8 elsewhere"
        found.append(Candidate(label, size, 0.8712 - drop, drop, recipe, 1.9 - 0.6 * share, seconds=2 + share))
    found.append(Candidate("everything int4, min-max", 50_300, 0.58, 0.2912, RECIPE, 1.1, seconds=2.5))
    front = [c for c in found if not any(o.bytes < c.bytes and o.score >= c.score for o in found)]
    fits = min((c for c in front if c.drop <= 0.01), key=lambda c: c.bytes)
    found = [replace(c, pareto=c in front, chosen=c is fits) for c in found]
    names = [layer for layer in layers(60) if layer.weights is not None]
    swept = [
        Sensitivity(layer.name, layer.native, scheme, db + float(rng.normal(0, 4)) - i % 7, 9000 // (k + 1))
        for i, layer in enumerate(names)
        for k, (scheme, db) in enumerate({"float16": 71.0, "int8": 43.0, "int8-int16": 47.0, "int4": 19.0}.items())
    ]
    limits = {"max_drop": 0.01, "max_size": 66_000.0}
    notes = ("int8-int16 runs on builtin kernels only",)
    return Tuning(
        "models/resnet8.tflite", "top1", limits, before, tuple(found), tuple(swept), (200, 1000), 187.4, 3, notes
    )


def algorithms() -> AlgorithmBench:
    """Two models, eight algorithms on each, three seeds; of one no file could be written."""
    rng = np.random.default_rng(9)

    def row(label: str, size: int, drop: float, step: float) -> AlgorithmRow:
        stages = () if label == "float" else ({label.split("{")[0]: {"clusters": 16, "granularity": "channel"}},)
        changes = [-drop + float(rng.normal(0, 0.4)) for _ in range(3)]
        runs = tuple(AlgorithmRun(i, 0.96 + c / 100, c, size, size // 2, 0.5, 16) for i, c in enumerate(changes))
        return AlgorithmRow(
            label,
            stages,
            0.96 - drop / 100,
            0.008,
            -drop,
            0.4,
            size,
            size / 2,
            0.5,
            16,
            step,
            step * 0.95,
            step * 1.1,
            runs,
        )

    rows = [row("float", 41_000, 0.0, 1.0)]
    rows += [row(f"mine:Algorithm{i}{{rate: 0.{i}}}", 30_000 - 3_000 * i, 0.3 * i, 1.0 + i / 10) for i in range(1, 7)]
    missing = {"bytes": None, "zstd": None, "zeros": None, "distinct": None, "notes": ("no file was written: reason",)}
    rows.append(replace(row("mine:Unwritten", 0, 2.0, 1.5), **missing, step=None, step_low=None, step_high=None))
    tables = tuple(AlgorithmTable("digits", model, 9610, (399, 200), tuple(rows)) for model in ("cnn", "mlp"))
    return AlgorithmBench("tensorflow", 200, 32, 3, tables, 118.2, ("a note",))
