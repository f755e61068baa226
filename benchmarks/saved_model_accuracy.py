"""What int8 weights cost SavedModels in accuracy, beside TensorFlow's own `quantize_saved_model`.

ResNet8 as trained; MobileNetV2, ResNet-50 and a small BERT with random weights, of channels of different size and with
batch normalization near the statistics of their data (`zoo.py`), exported by Keras. paring: `bf16-int8` with `range: mse` and
bias correction on 64 to 500 samples, on ResNet8 with `rounding: adaround` too, and as it is. Everything runs by its signature
in child processes.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar
import families
import figures
import numpy as np
import peer
import saved_model_zoo as saved
import trained
import zoo

BEST = "paring bf16-int8, mse, bias correction"
ROUNDED = "paring bf16-int8, mse, adaround, bias correction"
RECIPES: Mapping[str, Mapping[str, Any]] = {
    "paring bf16-int8": {},
    "paring bf16-int8, mse": {"range": "mse"},
    BEST: {"range": "mse", "bias_correction": True},
    ROUNDED: {"range": "mse", "rounding": "adaround", "bias_correction": True},
}
BATCH = 8
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Network:
    """A model and its data.

    Attributes:
      build: Gives the Keras model.
      data: Gives so many samples of `train` or `test`, by the names of the inputs; one input may have any name.
      calibration: Samples for bias correction.
      test: Samples to compare on.
    """

    build: Callable[[], Any]
    data: Callable[[str, int], Arrays]
    calibration: int = 64
    test: int = 32


def main() -> int:
    args = figures.arguments(
        __doc__, networks=",".join(NETWORKS), images=2000, seconds=900, child="", inputs="", outputs=""
    )
    if args.child:
        run(Path(args.child), Path(args.inputs), Path(args.outputs))
        return 0
    figure = figures.Figures(
        "saved_model_accuracy",
        "Error: norm of the difference to the float outputs over their norm, on inputs that no one calibrated on. "
        f"ResNet8: {args.images} CIFAR-10 test images (JPEG); drop: top-1 of float minus top-1; 2sd: two standard deviations "
        "of that paired difference.",
    )
    warnings.simplefilter("ignore")
    for name in args.networks.split(","):
        with tempfile.TemporaryDirectory(prefix="accuracy-") as here:
            compare(figure, name, Path(here), args.images if name == "ResNet8" else NETWORKS[name].test, args.seconds)
    return figure.finish(args.write)


def compare(figure: figures.Figures, name: str, here: Path, count: int, seconds: int) -> None:
    """One network: its rows and bars."""
    network = NETWORKS[name]
    model = network.build()
    model.export(str(here / "float"), verbose=False)
    np.savez(here / "test.npz", **network.data("test", count))
    truth = outputs(here / "float", here, seconds)
    if isinstance(truth, str):
        raise SystemExit(f"the float model does not run for {name}: {truth}")
    labels = cifar.labels("test", count) if name == "ResNet8" else None
    found: dict[str, dict[str, float]] = {}
    calibration = network.data("train", network.calibration)
    versions = [version for version in (*RECIPES, *peer.PEERS.values()) if version != ROUNDED or labels is not None]
    for version in versions:
        folder = here / f"version-{len(found)}"
        why = write(figure, name, version, here / "float", folder, calibration, seconds)
        got = outputs(folder, here, seconds) if why is None else why
        if isinstance(got, str):
            figure.note(f"{name}, {version}: {got}")
            continue
        row = {"error": worst(truth, got), "agreement": agreement(truth, got)}
        if labels is not None:
            row |= accuracy(truth, got, labels)
        found[version] = row
        figure.row(
            "networks", network=name, version=version, **row, int8_weights=saved.int8_elements(folder, here / "float"),
            bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        )  # fmt: skip
    if BEST not in found:
        return
    for other in (other for other in peer.PEERS.values() if other in found):
        figure.at_most(f"{name}: error over {other}'s", found[BEST]["error"] / found[other]["error"], 1.0)
    if labels is not None:
        figure.at_least(f"{name}: top-1 agreement with float", found[BEST]["agreement"], 0.99)
        figure.at_most(
            f"{name}: drop of top-1, at most two standard deviations", found[BEST]["drop"], found[BEST]["2sd"]
        )


def write(
    figure: figures.Figures, name: str, version: str, source: Path, target: Path, calibration: Arrays, seconds: int
) -> str | None:
    """Writes a version of a SavedModel; gives the reason where there is none."""
    import paring
    from paring.errors import ParingError

    modes = {told: mode for mode, told in peer.PEERS.items()}
    if version in modes:
        return peer.quantize(modes[version], source, target, seconds)
    settings = {"weights": "int8", "activations": "bfloat16", **RECIPES[version]}
    recipe = {"version": 1, "rules": [{"kind": "*", "apply": {"quantize": settings}}]}
    data = calibration if len(calibration) > 1 else next(iter(calibration.values()))
    try:
        result = paring.optimize(
            source, recipe, data if version in (BEST, ROUNDED) else None, output=target, verified=False
        )
    except ParingError as error:
        return peer.plain(str(error))
    for note in result.report.notes:
        if "bias correction" in note:
            figure.note(f"{name}, {version}: {note}")
    return None


def worst(truth: Arrays, got: Arrays) -> float:
    """The relative error of the worst output."""
    return max(float(np.linalg.norm(truth[key] - got[key]) / np.linalg.norm(truth[key])) for key in truth)


def agreement(truth: Arrays, got: Arrays) -> float:
    """Share of the samples whose largest value is in the same place."""
    return min(float((truth[key].argmax(-1) == got[key].argmax(-1)).mean()) for key in truth)


def accuracy(truth: Arrays, got: Arrays, labels: np.ndarray) -> dict[str, float]:
    """Top-1, and what it lost against float: the mean of the paired difference and two of its standard deviations."""
    (expected,), (scores,) = truth.values(), got.values()
    right, now = expected.argmax(-1) == labels, scores.argmax(-1) == labels
    change = now.astype(float) - right
    return {
        "top1_float": float(right.mean()), "top1": float(now.mean()), "drop": -float(change.mean()),
        "2sd": 2 * float(change.std() / len(change) ** 0.5),
    }  # fmt: skip


def outputs(folder: Path, here: Path, seconds: int) -> Arrays | str:
    """All outputs of a SavedModel on `test.npz`, or why it gives none."""
    target = folder.with_suffix(".npz")
    command = [
        sys.executable,
        __file__,
        "--child",
        str(folder),
        "--inputs",
        str(here / "test.npz"),
        "--outputs",
        str(target),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"does not run in {seconds} s"
    if done.returncode:
        return peer.why(done.returncode, done.stderr)
    with np.load(target) as found:
        return dict(found)


def run(folder: Path, inputs: Path, target: Path) -> None:
    """In the child: the outputs of `serving_default`, batch by batch."""
    import tensorflow as tf

    call = tf.saved_model.load(str(folder)).signatures["serving_default"]
    specs = call.structured_input_signature[1]
    with np.load(inputs) as found:
        data = dict(found)
    if len(specs) == 1:
        data = dict(zip(specs, data.values(), strict=True))
    parts: dict[str, list[np.ndarray]] = {}
    for at in range(0, len(next(iter(data.values()))), BATCH):
        given = {name: tf.constant(data[name][at : at + BATCH], spec.dtype) for name, spec in specs.items()}
        for name, value in call(**given).items():
            parts.setdefault(name, []).append(value.numpy())
    np.savez(target, **{name: np.concatenate(values) for name, values in parts.items()})


# -- networks ------------------------------------------------------------------------------------------------------


def _application(name: str, seed: int) -> Callable[[], Any]:
    """A network of Keras', up to its logits; batch normalization near the statistics of its data."""

    def build() -> Any:
        import keras

        keras.utils.set_random_seed(seed)
        settings = {"weights": None, "input_shape": (96, 96, 3), "classes": 100, "classifier_activation": None}
        model = getattr(keras.applications, name)(**settings)
        zoo.disturb(model, images("train", 16)["x"], np.random.default_rng(seed))
        return model

    return build


def images(part: str, count: int) -> Arrays:
    """Smooth random images, float32 [count, 96, 96, 3] from -1 to 1; those of `test` are others than those of `train`."""
    found = families.images(96, 64 + count, -1, 1)
    return {"x": found[:count] if part == "train" else found[64:]}


BERT = {"vocabulary": 8000, "length": 64, "width": 512, "layers": 4, "heads": 8}


def bert() -> Any:
    """BERT-small: an encoder of 4 layers of 512, normalization behind each part, a classifier on the first token."""
    import keras
    from keras import layers, ops

    keras.utils.set_random_seed(4)
    width, length = BERT["width"], BERT["length"]
    ids, mask = (keras.Input((length,), dtype="int32", name=name) for name in ("ids", "mask"))
    places = layers.Embedding(length, width)(ops.cumsum(ops.ones_like(ids), axis=1) - 1)
    x = layers.LayerNormalization()(layers.Embedding(BERT["vocabulary"], width)(ids) + places)
    seen = ops.cast(mask[:, None, :], "bool")
    for _ in range(BERT["layers"]):
        y = layers.MultiHeadAttention(BERT["heads"], width // BERT["heads"])(x, x, attention_mask=seen)
        x = layers.LayerNormalization()(x + y)
        y = layers.Dense(width)(layers.Dense(4 * width, activation="gelu")(x))
        x = layers.LayerNormalization()(x + y)
    pooled = layers.Dense(width, activation="tanh")(x[:, 0])
    model = keras.Model({"ids": ids, "mask": mask}, layers.Dense(16)(pooled))
    rng = np.random.default_rng(4)
    for weight in model.trainable_variables:
        if len(weight.shape) > 1:  # channels of different size, as training makes them
            weight.assign(np.asarray(weight) * rng.uniform(0.5, 2.0, weight.shape[-1]))
        else:
            weight.assign(np.asarray(weight) + rng.normal(scale=0.1, size=weight.shape))
    return model


def sentences(part: str, count: int) -> Arrays:
    """Token ids of different length, rare ones rarely: int32 [count, 64], and which are there."""
    rng = np.random.default_rng(["train", "test"].index(part))
    shape = (count, BERT["length"])
    ids = np.minimum(rng.zipf(1.3, shape), BERT["vocabulary"] - 1).astype(np.int32)
    mask = (np.arange(BERT["length"]) < rng.integers(8, BERT["length"] + 1, (count, 1))).astype(np.int32)
    return {"ids": ids * mask, "mask": mask}


NETWORKS: Mapping[str, Network] = {
    "ResNet8": Network(
        lambda: trained.float_model("ResNet8"),
        lambda part, count: {"x": trained.samples("ResNet8", part, count)[0]},
        200,
    ),
    "MobileNetV2": Network(_application("MobileNetV2", 2), images),
    "ResNet50": Network(_application("ResNet50", 3), images),
    "BERT-small": Network(bert, sentences),
}


if __name__ == "__main__":
    sys.exit(main())
