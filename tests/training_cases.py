"""Training on one backend, in a process of its own: `python training_cases.py FOLDER [CASE...]`, KERAS_BACKEND set.

Prints one line of JSON: what became of each case, `ok` or the error. A case is a function whose name begins with `case_`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

import paring

BACKEND = keras.backend.backend()
SPARSIFY = {"sparsify": {"sparsity": 0.5, "schedule": "polynomial", "start": 1, "end": 7, "every": 2}}
CLUSTER = {"cluster": {"clusters": 4}}
QUANTIZE = {"quantize": {"weights": "int8", "activations": "int8"}}
STAGES: dict[str, list[dict[str, Any]]] = {
    "qat": [QUANTIZE], "prune": [SPARSIFY], "cluster": [CLUSTER], "chain": [SPARSIFY, CLUSTER, QUANTIZE],
}  # fmt: skip
BATCH, BATCHES = 16, 4
FOLDER = Path()


def recipe(name: str) -> dict[str, Any]:
    return {"version": 1, "rules": [{"kind": "*", "apply": STAGES[name]}]}


def network(dtype: str = "float32", seed: int = 0) -> keras.Model:
    """A convolution with batch normalization, a depthwise one, a dense layer, dropout: 8 x 8 images of 4 classes."""
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((8, 8, 3), name="image")  # Keras gives another name after loading
    x = keras.layers.Conv2D(8, 3, padding="same", use_bias=False, dtype=dtype, name="conv")(x)
    x = keras.layers.BatchNormalization(dtype=dtype, momentum=0.5, name="norm")(x)
    x = keras.layers.ReLU(dtype=dtype, name="relu")(x)
    x = keras.layers.DepthwiseConv2D(3, activation="relu", dtype=dtype, name="deep")(x)
    x = keras.layers.GlobalAveragePooling2D(dtype=dtype, name="pool")(x)
    x = keras.layers.Dropout(0.2, seed=3, dtype=dtype, name="drop")(x)
    return keras.Model(inputs, keras.layers.Dense(4, dtype=dtype, name="head")(x), name="small")


def samples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH * BATCHES, 8, 8, 3)).astype(np.float32)
    return x, (2 * (x[..., 0].mean((1, 2)) > 0) + (x[..., 1].mean((1, 2)) > 0)).astype(np.int32)


def compiled(model: keras.Model, **options: Any) -> keras.Model:
    rate = keras.optimizers.schedules.ExponentialDecay(0.02, 5, 0.9)
    options = {"optimizer": keras.optimizers.Adam(rate, weight_decay=1e-4), **options}
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), **options)
    return model


def fitted(model: keras.Model, epochs: int, initial: int = 0, **options: Any) -> list[float]:
    x, y = samples()
    found = model.fit(x, y, BATCH, initial_epoch=initial, epochs=epochs, shuffle=False, verbose=0, **options)
    return [float(v) for v in found.history["loss"]]


def weights(model: keras.Model) -> dict[str, np.ndarray]:
    """The kernels, by layer, as [outputs, rest]."""
    found = {}
    for name in ("conv", "deep", "head"):
        kernel = np.asarray(ops.convert_to_numpy(model.get_layer(name).kernel), np.float32)
        found[name] = kernel.reshape(-1, kernel.shape[-1] * (kernel.shape[-2] if name == "deep" else 1)).T
    return found


def share(model: keras.Model) -> float:
    """Zeros among the raw weights."""
    found = weights(model)
    return sum((w == 0).sum() for w in found.values()) / sum(w.size for w in found.values())


def near_half(value: float) -> None:
    assert abs(value - 0.5) < 0.03, f"{value:.3f} of the raw weights are zero"


def promised(name: str, model: keras.Model) -> None:
    """What a recipe promises of a finalized model."""
    found = weights(model)
    if name in ("prune", "chain"):
        near_half(share(model))
    for layer, matrix in found.items():
        distinct = max(len(np.unique(row)) for row in matrix)
        if name in ("cluster", "chain"):
            assert distinct <= 4, f"{layer}: {distinct} distinct values"
        if name in ("qat", "chain"):
            scale = np.abs(matrix).max(1, keepdims=True) / 127
            codes = matrix / np.maximum(scale, 1e-12)
            assert np.abs(codes - np.round(codes)).max() < 1e-3, f"{layer} is off its grid"


def trained(name: str, model: keras.Model, steps: int) -> None:
    """What must hold behind training: the schedule followed, zeros in the raw weights, the deployed form as finalized."""
    x, _ = samples()
    if name in ("prune", "chain"):
        near_half(share(model))
    for value in model.get_weights():
        assert np.isfinite(np.asarray(value, np.float32)).all()
    before = model.predict(x, verbose=0)
    assert np.isfinite(before).all()
    attachment = paring.training.attaching.attachment_of(model)
    assert int(ops.convert_to_numpy(attachment.step())) == steps, f"at step {attachment.step()}, not {steps}"
    paring.finalize(model)
    promised(name, model)
    if name in ("prune", "cluster"):
        after = model.predict(x, verbose=0)
        assert np.abs(after - before).max() < 1e-4 * np.abs(before).max() + 1e-6, "finalize changes the predictions"


# -- fit ---------------------------------------------------------------------------------------------------------------


def _fit(
    name: str, *, dtype: str = "float32", epochs: int = 3, steps: int = 3 * BATCHES, **options: Any
) -> list[float]:
    x, _ = samples()
    model = compiled(network(dtype), **options)
    shape = [w.shape for w in model.get_weights()]
    said: list[str] = []
    model.summary(print_fn=lambda line, **_: said.append(line))
    paring.attach(model, recipe(name), x[:32])
    behind: list[str] = []
    model.summary(print_fn=lambda line, **_: behind.append(line))
    losses = fitted(model, epochs)
    assert [w.shape for w in model.get_weights()] == shape
    assert said == behind, "\n".join(behind)
    assert losses[-1] < losses[0] and np.isfinite(losses).all(), losses
    trained(name, model, steps)
    return losses


def case_eager() -> None:
    if BACKEND == "tensorflow":
        _fit("chain", run_eagerly=True)


def case_compiled() -> None:
    if BACKEND == "tensorflow":  # JAX compiles anyway, PyTorch's compiler needs one of C++
        _fit("chain", jit_compile=True)


def case_float16() -> None:
    _fit("chain", dtype="mixed_float16")


def case_bfloat16() -> None:
    if BACKEND == "tensorflow":
        _fit("chain", dtype="mixed_bfloat16")


def case_accumulation() -> None:
    _fit("chain", epochs=6, optimizer=keras.optimizers.Adam(0.02, gradient_accumulation_steps=2))


def case_several_steps_per_execution() -> None:
    if BACKEND == "tensorflow":
        _fit("prune", steps_per_execution=2)


def case_train_on_batch() -> None:
    """The schedule is followed step by step, and zeros stay behind each of them."""
    x, y = samples()
    model = compiled(network())
    paring.attach(model, recipe("chain"))
    zeros = []
    for _ in range(3):
        for i in range(0, len(x), BATCH):
            model.train_on_batch(x[i : i + BATCH], y[i : i + BATCH])
            zeros.append(share(model))
    assert zeros == sorted(zeros) and zeros[1] < 0.05 < zeros[4], zeros
    trained("chain", model, 3 * BATCHES)


def case_evaluate_is_deployed() -> None:
    """`evaluate` gives the loss of what `predict` gives, and counts nothing."""
    x, y = samples()
    model = compiled(network())
    paring.attach(model, recipe("chain"), x)
    fitted(model, 1)
    before = [np.array(w) for w in everything(model)]
    loss = model.evaluate(x, y, BATCH, verbose=0)
    logits = model.predict(x, verbose=0)
    wanted = -np.mean(np.take_along_axis(logits - np.log(np.exp(logits).sum(1, keepdims=True)), y[:, None], 1))
    assert abs(loss - wanted) < 1e-4, (loss, wanted)
    assert all(np.array_equal(a, b) for a, b in zip(before, everything(model), strict=True))


def everything(model: keras.Model) -> list[np.ndarray]:
    return [np.asarray(ops.convert_to_numpy(v)) for v in model.variables]


# -- loops of one's own ------------------------------------------------------------------------------------------------


def _loop(optimizer: Any, rate: float = 0.3) -> None:
    """Twelve steps in a loop of one's own: with a Keras optimizer, or without one."""
    x, y = samples()
    model = network()
    attachment = paring.attach(model, recipe("chain"), x, optimizer=optimizer)
    step = {"tensorflow": _step_tensorflow, "jax": _step_jax, "torch": _step_torch}[BACKEND](
        model, attachment, optimizer, rate
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    losses = [float(loss(y, ops.convert_to_numpy(model(x, training=False))))]
    for _ in range(3):
        for i in range(0, len(x), BATCH):
            step(x[i : i + BATCH], y[i : i + BATCH])
    losses.append(float(loss(y, ops.convert_to_numpy(model(x, training=False)))))
    assert losses[1] < losses[0], losses
    trained("chain", model, 3 * BATCHES)


def _step_tensorflow(model: Any, attachment: Any, optimizer: Any, rate: float) -> Any:
    import tensorflow as tf

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            value = loss(y, model(x, training=True))
        variables = model.trainable_variables
        gradients = tape.gradient(value, variables)
        if optimizer is not None:
            optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.assign_sub(rate * gradient)
        attachment.advance()

    if optimizer is not None:
        optimizer.build(model.trainable_variables)
    return step


def _step_torch(model: Any, attachment: Any, optimizer: Any, rate: float) -> Any:
    import torch

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain = torch.optim.SGD(model.parameters(), rate) if optimizer is None else None

    def step(x: Any, y: Any) -> None:
        model.zero_grad()
        loss(torch.tensor(y), model(torch.tensor(x), training=True)).backward()
        if plain is not None:
            plain.step()
            attachment.advance()
            return
        with torch.no_grad():
            optimizer.apply([v.value.grad for v in model.trainable_weights], model.trainable_weights)

    return step


def _step_jax(model: Any, attachment: Any, optimizer: Any, rate: float) -> Any:
    import jax

    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if optimizer is not None:
        optimizer.build(model.trainable_variables)

    def losses(trained: Any, others: Any, x: Any, y: Any) -> Any:
        found, others = model.stateless_call(trained, others, x, training=True)
        return loss(y, found), others

    @jax.jit
    def pure(trained: Any, others: Any, own: Any, x: Any, y: Any) -> Any:
        (_, others), gradients = jax.value_and_grad(losses, has_aux=True)(trained, others, x, y)
        if optimizer is not None:
            trained, own = optimizer.stateless_apply(own, gradients, trained)
        else:
            trained = [v - rate * g for v, g in zip(trained, gradients, strict=True)]
        return (*attachment.stateless_advance(trained, others), own)

    def step(x: Any, y: Any) -> None:
        groups = (model.trainable_variables, model.non_trainable_variables, optimizer.variables if optimizer else [])
        found = pure(*([v.value for v in group] for group in groups), x, y)
        for group, values in zip(groups, found, strict=True):
            for variable, value in zip(group, values, strict=True):
                variable.assign(value)

    return step


def case_loop_with_keras_optimizer() -> None:
    _loop(keras.optimizers.Adam(0.02))


def case_loop_without_optimizer() -> None:
    _loop(None)


# -- saving ------------------------------------------------------------------------------------------------------------


def _resumed(name: str) -> None:
    """Two epochs, a file, and two epochs more are four epochs."""
    x, _ = samples()
    whole = compiled(network())
    paring.attach(whole, recipe(name), x)
    wanted = fitted(whole, 4)
    model = compiled(network())
    paring.attach(model, recipe(name), x)
    found = fitted(model, 2)
    path = FOLDER / f"{name}.keras"
    model.save(path)
    again = paring.load_model(path)
    if name in ("prune", "chain"):
        assert abs(share(again) - share(model)) == 0 < share(again)
    for one, other in zip(model.variables, again.variables, strict=True):
        assert np.array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other)), (
            one.path,
            other.path,
            one,
            other,
        )
    assert np.array_equal(model.predict(x, verbose=0), again.predict(x, verbose=0))
    found += fitted(again, 4, initial=2)
    assert np.allclose(found, wanted, rtol=1e-5), (found, wanted)
    for one, other in zip(everything(whole), everything(again), strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-6), np.abs(one - other).max()
    trained(name, again, 4 * BATCHES)


def case_resume_qat() -> None:
    _resumed("qat")


def case_resume_prune() -> None:
    _resumed("prune")


def case_resume_cluster() -> None:
    _resumed("cluster")


def case_resume_chain() -> None:
    _resumed("chain")


def case_export() -> None:
    """The file is written from any backend (with the help of TensorFlow); its values are those of `predict`."""
    x, _ = samples()
    model = compiled(network())
    paring.attach(model, recipe("chain"), x)
    fitted(model, 3)
    model.save(FOLDER / "export.keras")
    np.save(FOLDER / "export.npy", model.predict(x, verbose=0))
    if importlib.util.find_spec("tensorflow") is not None:
        paring.export(model, FOLDER / "export.tflite")


def again() -> None:
    """What another backend saved, loaded here: the same bytes, and the values that were predicted there."""
    from ai_edge_litert.interpreter import Interpreter

    x, _ = samples()
    model = paring.load_model(FOLDER / "export.keras", compile=False)
    paring.export(model, FOLDER / "again.tflite", overwrite=True)
    content = (FOLDER / "again.tflite").read_bytes()
    assert content == (FOLDER / "export.tflite").read_bytes(), "another file"
    interpreter = Interpreter(model_content=content)
    take, give = (details()[0] for details in (interpreter.get_input_details, interpreter.get_output_details))
    interpreter.resize_tensor_input(take["index"], x.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(take["index"], x)
    interpreter.invoke()
    wanted = np.load(FOLDER / "export.npy")
    apart = np.abs(interpreter.get_tensor(give["index"]) - wanted)
    name = next(s.name for s in paring.training.attaching.attachment_of(model).sites.all() if s.name.endswith("head"))
    low, high = paring.training.attaching.attachment_of(model).state.named[f"range/{name}"].numpy()
    assert np.mean(apart <= 1.01 * (high - low) / 255) > 0.97, np.sort(apart.ravel())[-5:]


def case_two_replicas() -> None:
    """Data parallel training on two devices of one machine, which is TensorFlow's."""
    if BACKEND != "tensorflow":
        return
    import tensorflow as tf

    x, _ = samples()
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        model = compiled(network())
        attachment = paring.attach(model, recipe("chain"), x)
    fitted(model, 3)
    for variable in (*attachment.state.variables, *model.trainable_variables):
        one, other = (value.numpy() for value in variable.value.values)
        assert np.array_equal(one, other), variable.path
    trained("chain", model, 3 * BATCHES)


def main(folder: str, names: list[str]) -> None:
    global FOLDER
    FOLDER = Path(folder)
    found = {}
    if BACKEND == "tensorflow":
        import tensorflow as tf

        devices = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
    for name in names or [n for n in globals() if n.startswith("case_")]:
        try:
            globals()[name]()
            found[name] = "ok"
        except Exception:
            found[name] = traceback.format_exc()[-3000:]
        keras.backend.clear_session()
    print("\n\x1e" + json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
