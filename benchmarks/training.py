"""ResNet8 fine-tuned with paring (Keras 3, TensorFlow), by the protocol of `finetune.py`, beside the figures of tfmot's twin.

`tfmot_twin.py` writes what `docs/figures/tfmot.json` holds; where the file is missing, nothing is compared.
`--folder` keeps the runs, so that one that was interrupted goes on; `--finished 1` takes only those that are there, `--jit 0`
leaves out the cost of steps under XLA.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import figures
import finetune
import keras
import numpy as np
import tensorflow as tf

from paring import Recipe, attach, export
from paring.formats.convert import to_tflite

Settings = Mapping[str, Any]
INT8: Settings = {"quantize": {"weights": "int8", "activations": "int8"}}
INT4: Settings = {"quantize": {"weights": "int4", "activations": "int8", "steps": "lsq"}}


def sparsify(share: float) -> Settings:
    """Single weights, chosen before the first step on the images that ranges are calibrated on; then they stay."""
    return {"sparsify": {"sparsity": share, "pattern": "unstructured", "allocation": "error"}}


CLUSTER: Settings = {"cluster": {"clusters": 16, "granularity": "channel", "start": 0.1, "unit": "fraction"}}
TECHNIQUES: Mapping[str, list[Settings]] = {
    "float": [],
    "int8 QAT": [INT8],
    "int4 weights, int8 activations": [INT4],
    "80 % sparse, int8": [sparsify(0.8), INT8],
    "50 % sparse, 16 clusters, int8": [sparsify(0.5), CLUSTER, INT8],
}
COSTS: Mapping[str, tuple[list[Settings], float]] = {
    "QAT": ([INT8], 1.5),
    "pruning": ([{"sparsify": {"sparsity": 0.8, "schedule": "polynomial", "end": 1_000_000, "every": 10}}], 1.1),
    "clustering": ([{"cluster": {"clusters": 16}}], 1.2),
}
MOST_LOST = {  # points, against the float twin
    "int8 QAT": 0.3,
    "int4 weights, int8 activations": 1.5,
    "80 % sparse, int8": 1.5,
    "50 % sparse, 16 clusters, int8": 1.5,
}
TWINS = {  # what tfmot has for it; the better one where it has two
    "int8 QAT": ("int8 QAT",),
    "int4 weights, int8 activations": ("int4 weights, int8 activations",),
    "80 % sparse, int8": ("80 % sparse, int8 after training", "80 % sparse, int8 (PQAT)"),
    "50 % sparse, 16 clusters, int8": (
        "50 % sparse, 16 clusters per tensor, int8 (PCQAT)",
        "50 % sparse, 16 clusters per channel, int8 (PCQAT)",
    ),
}


class _Rate(keras.callbacks.Callback):
    """Sets the learning rate before each step."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        del logs
        self.model.optimizer.learning_rate.assign(finetune.rate(batch, self.steps))


def attached(stages: list[Settings], calibration: np.ndarray | None, steps: int) -> Any:
    """ResNet8, compiled, with a recipe of these stages at work."""
    model = keras.models.load_model(finetune.MODEL, compile=False)
    if stages:
        recipe = Recipe.load({"version": 1, "rules": [{"kind": "*", "apply": stages}]})
        attach(model, recipe, calibration, steps_per_epoch=steps, epochs=1)
    return model


def trained(data: finetune.Data, seed: int, steps: int, stages: list[Settings], path: Path) -> dict[str, Any]:
    """Trains, exports and judges."""
    keras.utils.set_random_seed(seed)
    model = attached(stages, data.calibration, steps)
    model.compile(keras.optimizers.Adam(finetune.RATE), "sparse_categorical_crossentropy", jit_compile=False)
    signature = (tf.TensorSpec((finetune.BATCH, 32, 32, 3), tf.float32), tf.TensorSpec((finetune.BATCH,), tf.int64))
    stream = tf.data.Dataset.from_generator(lambda: data.batches(seed, 0, steps), output_signature=signature)
    model.fit(stream, epochs=1, steps_per_epoch=steps, shuffle=False, verbose=0, callbacks=[_Rate(steps)])
    deployed = float((model.predict(data.test, verbose=0).argmax(-1) == data.test_classes).mean())
    if stages:
        export(model, path, overwrite=True)
    else:
        to_tflite(model, path)
    return {**finetune.judged(path, data), "evaluated": deployed}


def once(path: Path, asked: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A run's row, kept beside its file, so that what was interrupted goes on with the same `--folder`."""
    kept = path.with_suffix(".json")
    if path.exists() and kept.exists():
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known["asked"] == asked:
            return dict(known["row"])
    keras.backend.clear_session()
    row = run()
    kept.write_text(json.dumps({"asked": asked, "row": row}), encoding="utf-8")
    return row


def cost(data: finetune.Data, rounds: int, jit: bool) -> dict[str, dict[str, float]]:
    """Processor time of five training steps over float's."""
    images, labels = next(data.batches(0, 0, 1))
    images, labels = np.tile(images, (5, 1, 1, 1)), np.tile(labels, 5)

    def run(stages: list[Settings]) -> Callable[[], object]:
        model = attached(stages, data.calibration, 1000)
        model.compile(keras.optimizers.Adam(finetune.RATE), "sparse_categorical_crossentropy", jit_compile=jit)
        return lambda: model.fit(images, labels, batch_size=finetune.BATCH, shuffle=False, verbose=0)

    runs = {"float": run([]), **{name: run(stages) for name, (stages, _) in COSTS.items()}}
    return finetune.alternated(runs, rounds)


def promises(figure: figures.Figures, name: str, rows: list[dict[str, Any]]) -> None:
    """What the recipe promised, looked up in every file."""
    if "sparse" in name:
        share = 0.8 if "80" in name else 0.5
        worst = min(row["zeros"] for row in rows)
        figure.at_least(f"{name}: zeros among all weights, worst file", worst, share - 0.001)
    if "clusters" in name:
        figure.at_most(f"{name}: distinct integers in an output channel", max(row["distinct"] for row in rows), 16)
    if "int4" in name:
        figure.at_most(f"{name}: distinct integers in a layer", max(row["distinct_tensor"] for row in rows), 15)


def compare(figure: figures.Figures, found: Mapping[str, list[dict[str, Any]]], theirs: Path) -> None:
    """Accuracy and cost beside tfmot's."""
    if not theirs.exists():
        figure.note(f"{theirs.name} is missing: nothing is compared")
        return
    tables = json.loads(theirs.read_text(encoding="utf-8"))["tables"]
    peers = {row["technique"]: row for row in tables["ResNet8, mean of the seeds"]}
    for name, twins in TWINS.items():
        possible = [peers[twin] for twin in twins if twin in peers]
        if name not in found or not possible:
            continue
        best = max(possible, key=lambda row: row["top1"])
        ours = float(np.mean([row["top1"] for row in found[name]]))
        figure.row("beside tfmot", technique=name, paring=ours, tfmot=best["top1"], tfmot_by=best["technique"])
        figure.at_least(f"{name}: top-1 over tfmot's {best['top1']:.4f}", ours - best["top1"], 0.0)


def main() -> int:
    args = figures.arguments(
        __doc__, steps=finetune.STEPS, seeds=len(finetune.SEEDS), only="", rounds=12, jit=1, folder="", finished=0
    )
    folder = Path(args.folder or tempfile.mkdtemp(prefix="training-"))
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    data = finetune.Data()
    figure = figures.Figures("training", finetune.about(args.steps, args.seeds))
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in finetune.SEEDS[: args.seeds]:
        for name, stages in TECHNIQUES.items():
            if args.only and args.only not in name:
                continue
            path = folder / f"paring-{list(TECHNIQUES).index(name)}-{seed}.tflite"
            if args.finished and not path.with_suffix(".json").exists():
                figure.note(f"{name}: no run with seed {seed}")
                continue
            row = {"seed": seed} | once(
                path, {"stages": stages, "steps": args.steps}, partial(trained, data, seed, args.steps, stages, path)
            )
            figure.row("ResNet8, by seed", technique=name, **row)
            found.setdefault(name, []).append(row)
    losses = finetune.summary(figure, found)
    for name, most in MOST_LOST.items():
        if name in found and "float" in found:
            figure.at_least(f"{name}: points over the float twin", losses[name], -most)
        if name in found:
            promises(figure, name, found[name])
    compare(figure, found, figures.REPOSITORY / "docs" / "figures" / "tfmot.json")
    if args.rounds:
        for mode, jit in (("graph mode", False), ("jit_compile=True", True))[: 1 + args.jit]:
            for name, values in cost(data, args.rounds, jit).items():
                figure.row(f"cost of a training step over float, {mode}", technique=name, **values)
                if name != "float":
                    figure.at_most(f"{name}, {mode}: cost of a step over float", values["ratio"], COSTS[name][1])
        figure.note(finetune.COST)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
