"""ResNet8 fine-tuned with tfmot (tf_keras), by the protocol of `finetune.py`: accuracy of its files, cost of a step.

Runs in an environment of its own: `pip install tensorflow-cpu==2.19.* tf_keras==2.19.* tensorflow-model-optimization==0.8.1`
and paring, which reads the files. tfmot has no Keras 3.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import figures
import finetune
import numpy as np
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras as keras
from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster as experimental_cluster
from tensorflow_model_optimization.python.core.quantization.keras.experimental.default_n_bit import (
    default_n_bit_quantize_scheme,
)

SPARSE, HALF, CLUSTERS = 0.8, 0.5, 16
TWO, THREE = (0.6, 1.0), (0.4, 0.7, 1.0)  # where the stages of a chain end, of all steps


class Run:
    """One training: a model that goes through stages, all on one stream of data and one schedule."""

    def __init__(self, data: finetune.Data, seed: int, steps: int) -> None:
        keras.utils.set_random_seed(seed)
        self.data, self.seed, self.steps, self.done = data, seed, steps, 0
        self.model = keras.models.load_model(finetune.MODEL, compile=False)

    def train(self, until: float = 1.0, callbacks: tuple[Any, ...] = ()) -> None:
        """Trains to a share of all steps."""
        first, last = self.done, round(until * self.steps)
        signature = (
            tf.TensorSpec((finetune.BATCH, 32, 32, 3), tf.float32),
            tf.TensorSpec((finetune.BATCH,), tf.int64),
        )
        stream = tf.data.Dataset.from_generator(
            lambda: self.data.batches(self.seed, first, last), output_signature=signature
        )
        compiled(self.model)
        rate = _Rate(self.model, first, self.steps)
        self.model.fit(stream, epochs=1, verbose=0, callbacks=[rate, *callbacks])
        self.done = last

    def prune(self, sparsity: float, until: float) -> None:
        """Rises to the sparsity over the first half of the stage, every tenth step, and strips the wrappers."""
        end = max(
            round(until * self.steps) // 20 * 10, 10
        )  # the schedule misses its end unless it is one of those steps
        schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, sparsity, begin_step=0, end_step=end, frequency=10)
        self.model = tfmot.sparsity.keras.prune_low_magnitude(self.model, pruning_schedule=schedule)
        self.train(until, (tfmot.sparsity.keras.UpdatePruningStep(),))
        self.model = tfmot.sparsity.keras.strip_pruning(self.model)

    def cluster(self, until: float, per_channel: bool) -> None:
        """16 centroids per tensor, or per channel of convolutions and per tensor of the dense layer; zeros kept.

        k-means++ per channel fails on channels with fewer weights of one sign than it wants centroids for that sign.
        """
        kinds = tfmot.clustering.keras.CentroidInitialization
        self.model = experimental_cluster.cluster_weights(
            self.model, CLUSTERS, kinds.LINEAR if per_channel else kinds.KMEANS_PLUS_PLUS,
            preserve_sparsity=True, cluster_per_channel=per_channel,
        )  # fmt: skip
        self.train(until)
        self.model = tfmot.clustering.keras.strip_clustering(self.model)

    def quantize(self, scheme: Any = None) -> None:
        """Quantization-aware training on what is left of the steps."""
        annotated = tfmot.quantization.keras.quantize_annotate_model(self.model)
        arguments = () if scheme is None else (scheme,)
        self.model = tfmot.quantization.keras.quantize_apply(annotated, *arguments)
        self.train()


class _Rate(keras.callbacks.Callback):
    """Sets the learning rate before each step."""

    def __init__(self, model: Any, first: int, steps: int) -> None:
        super().__init__()
        self.of, self.first, self.steps = model, first, steps

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        del logs
        self.of.optimizer.learning_rate.assign(finetune.rate(self.first + batch, self.steps))


def compiled(model: Any, jit: bool = False) -> Any:
    """The model, ready to train."""
    optimizer = keras.optimizers.Adam(finetune.RATE)
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=jit)
    return model


def converted(model: Any, calibration: np.ndarray | None = None, integer: bool = True, low_bit: bool = False) -> bytes:
    """The file of TensorFlow's converter: float, by the trained ranges, or calibrated."""
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if integer:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if calibration is not None:
        converter.representative_dataset = lambda: ([image[None]] for image in calibration)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter._experimental_low_bit_qat = low_bit
    content: bytes = converter.convert()
    return content


def float_twin(run: Run) -> bytes:
    run.train()
    return converted(run.model, integer=False)


def qat(run: Run) -> bytes:
    run.quantize()
    return converted(run.model)


def int4(run: Run) -> bytes:
    run.quantize(default_n_bit_quantize_scheme.DefaultNBitQuantizeScheme(num_bits_weight=4, num_bits_activation=8))
    return converted(run.model, low_bit=True)


def prune_ptq(run: Run) -> bytes:
    run.prune(SPARSE, 1.0)
    return converted(run.model, run.data.calibration)


def pqat(run: Run) -> bytes:
    run.prune(SPARSE, TWO[0])
    run.quantize(tfmot.experimental.combine.Default8BitPrunePreserveQuantizeScheme())
    return converted(run.model)


def pcqat(run: Run, per_channel: bool = False) -> bytes:
    run.prune(HALF, THREE[0])
    run.cluster(THREE[1], per_channel)
    run.quantize(tfmot.experimental.combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=True))
    return converted(tfmot.experimental.combine.strip_clustering_cqat(run.model))


TECHNIQUES: dict[str, Callable[[Run], bytes]] = {
    "float": float_twin,
    "int8 QAT": qat,
    "int4 weights, int8 activations": int4,
    "80 % sparse, int8 after training": prune_ptq,
    "80 % sparse, int8 (PQAT)": pqat,
    "50 % sparse, 16 clusters per tensor, int8 (PCQAT)": pcqat,
    "50 % sparse, 16 clusters per channel, int8 (PCQAT)": lambda run: pcqat(run, per_channel=True),
}


def cost(data: finetune.Data, rounds: int, jit: bool) -> dict[str, dict[str, float]]:
    """Processor time of five training steps over float's, for every technique that compiles."""
    images, labels = next(data.batches(0, 0, 1))
    images, labels = np.tile(images, (5, 1, 1, 1)), np.tile(labels, 5)

    def loaded() -> Any:
        return keras.models.load_model(finetune.MODEL, compile=False)

    def pruned() -> Any:
        schedule = tfmot.sparsity.keras.PolynomialDecay(0.0, SPARSE, 0, 1_000_000, frequency=10)
        return tfmot.sparsity.keras.prune_low_magnitude(loaded(), pruning_schedule=schedule)

    def clustered(per_channel: bool) -> Any:
        seeds = tfmot.clustering.keras.CentroidInitialization.KMEANS_PLUS_PLUS
        return experimental_cluster.cluster_weights(loaded(), CLUSTERS, seeds, cluster_per_channel=per_channel)

    def run(model: Any, *callbacks: Any) -> Callable[[], object]:
        compiled(model, jit)
        return lambda: model.fit(
            images, labels, batch_size=finetune.BATCH, shuffle=False, verbose=0, callbacks=[*callbacks]
        )

    runs = {
        "float": run(loaded()),
        "QAT": run(tfmot.quantization.keras.quantize_model(loaded())),
        "pruning": run(pruned(), tfmot.sparsity.keras.UpdatePruningStep()),
        "clustering per tensor": run(clustered(per_channel=False)),
        "clustering per channel": run(clustered(per_channel=True)),
    }
    possible = {}
    for name, steps in runs.items():
        try:
            steps()
            possible[name] = steps
        except Exception as error:  # what XLA cannot compile is a finding
            print(f"{name}: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
    return finetune.alternated(possible, rounds)


def main() -> int:
    args = figures.arguments(
        __doc__, steps=finetune.STEPS, seeds=len(finetune.SEEDS), only="", rounds=12, jit=1, folder="", finished=0
    )
    folder = Path(args.folder or tempfile.mkdtemp(prefix="tfmot-"))
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    warnings.simplefilter("ignore")
    data = finetune.Data()
    figure = figures.Figures("tfmot", finetune.about(args.steps, args.seeds))
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in finetune.SEEDS[: args.seeds]:
        for name, technique in TECHNIQUES.items():
            if args.only and args.only not in name:
                continue
            path = folder / f"tfmot-{list(TECHNIQUES).index(name)}-{seed}.tflite"
            if args.finished and not path.exists():
                figure.note(f"{name}: no file with seed {seed}")
                continue
            keras.backend.clear_session()
            try:
                if not path.exists():  # files of an interrupted run are judged, not made again
                    path.write_bytes(technique(Run(data, seed, args.steps)))
                row = {"seed": seed} | finetune.judged(path, data)
            except Exception as error:  # what tfmot cannot do is a finding of this benchmark
                figure.note(f"{name}: not possible: {type(error).__name__}: {str(error).strip().splitlines()[0][:300]}")
                continue
            figure.row("ResNet8, by seed", technique=name, **row)
            found.setdefault(name, []).append(row)
    finetune.summary(figure, found)
    if args.rounds:
        for mode, jit in (("graph mode", False), ("jit_compile=True", True))[: 1 + args.jit]:
            for name, values in cost(data, args.rounds, jit).items():
                figure.row(f"cost of a training step over float, {mode}", technique=name, **values)
        figure.note(finetune.COST)
    return figure.finish(args.write)


if __name__ == "__main__":
    sys.exit(main())
