"""Attaching to live Keras models of every kind, on TensorFlow: what is refused, what stays as it was, what is saved."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import paring
from paring.errors import BoundError, InputError

# Keras variables predate NumPy 2's `copy`.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
keras: Any = None


@pytest.fixture(autouse=True, scope="module")
def _keras(keras_on_tensorflow: ModuleType) -> None:
    global keras
    keras = keras_on_tensorflow


PRUNE = {"sparsify": {"sparsity": 0.5}}
LATER = {"sparsify": {"sparsity": 0.5, "schedule": "polynomial", "start": 0, "end": 4}}
CLUSTER = {"cluster": {"clusters": 4}}
INT8 = {"quantize": {"weights": "int8", "activations": "int8"}}


def recipe(*stages: dict[str, Any], **selector: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{**(selector or {"kind": "*"}), "apply": list(stages)}]}


def dense(*, name: str = "small") -> Any:
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="features")
    x = keras.layers.Dense(8, activation="relu", name="one")(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="two")(x), name=name)


def data(size: int = 6, count: int = 32) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((count, size)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int32)


def compiled(model: Any, **options: Any) -> Any:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(**{"optimizer": keras.optimizers.Adam(0.02), "loss": loss, "run_eagerly": True, **options})
    return model


def portrait(model: Any) -> Any:
    """What may not change where attaching is refused, and is back behind finalize."""
    layers = [model, *(layer for layer in model._flatten_layers() if layer is not model)]
    attributes = [(layer.name, sorted(layer.__dict__), layer.__dict__.get("call")) for layer in layers]
    constraints = [(v.path, v.constraint) for v in model.variables]
    return attributes, constraints, [np.array(v) for v in model.variables]


def same(one: Any, other: Any) -> bool:
    return bool(one[:2] == other[:2] and all(np.array_equal(a, b) for a, b in zip(one[2], other[2], strict=True)))


# -- what is refused ---------------------------------------------------------------------------------------------------


def _refused(model: Any, *args: Any, **options: Any) -> str:
    before = portrait(model)
    with pytest.raises(InputError) as caught:
        paring.attach(model, *args, **options)
    assert same(before, portrait(model))
    return str(caught.value)


def test_a_recipe_that_touches_no_layer_is_refused() -> None:
    said = _refused(dense(), recipe(INT8, name="conv.*"))
    assert "conv.*" in said


def test_a_recipe_for_layers_without_weights_is_refused() -> None:
    inputs = keras.Input((4, 4, 1))
    said = _refused(keras.Model(inputs, keras.layers.MaxPooling2D()(inputs)), recipe(PRUNE))
    assert "no layer" in said


def test_a_pattern_that_does_not_fit_names_the_nearest() -> None:
    said = _refused(dense(), recipe({"sparsify": {"sparsity": 0.5, "pattern": "16x1"}}))
    assert "one" in said and "8x1" in said


def test_attaching_twice_is_refused() -> None:
    model = dense()
    attachment = paring.attach(model, recipe(PRUNE))
    said = _refused(model, recipe(INT8))
    assert "attached already" in said and "finalize" in said
    paring.finalize(model)
    assert str(attachment)


def test_a_layer_works_in_one_attachment() -> None:
    first = dense()
    other = keras.Model(first.input, keras.layers.Dense(2)(first.output), name="other")
    paring.attach(first, recipe(PRUNE))
    said = _refused(other, recipe(PRUNE))
    assert f"of model {first.name}" in said
    paring.finalize(first)
    assert paring.attach(other, recipe(PRUNE)).rows


def test_a_schedule_in_epochs_needs_their_length() -> None:
    stage = {"sparsify": {"sparsity": 0.5, "schedule": "cosine", "start": 0, "end": 2, "unit": "epochs"}}
    assert "steps_per_epoch" in _refused(dense(), recipe(stage))
    attachment = paring.attach(dense(), recipe(stage), steps_per_epoch=10)
    assert attachment.rows[1].became


def test_an_unbuilt_model_is_refused() -> None:
    model = keras.Sequential([keras.layers.Dense(3)])
    with pytest.raises(InputError, match="not built"):
        paring.attach(model, recipe(PRUNE))
    assert not hasattr(model, "paring_state")


def test_something_else_than_a_model_is_refused() -> None:
    with pytest.raises(InputError, match="live Keras 3 model"):
        paring.attach("model.keras", recipe(PRUNE))


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_calibration_data_must_be_finite(bad: float) -> None:
    x, _ = data()
    x[3, 2] = bad
    assert "finite" in _refused(dense(), recipe(INT8), x)


def test_weights_must_be_finite() -> None:
    model = dense()
    kernel = model.get_layer("one").kernel
    kernel.assign(np.full(kernel.shape, np.nan, np.float32))
    before = sorted(model.__dict__)
    with pytest.raises(InputError, match="finite"):
        paring.attach(model, recipe(CLUSTER))
    assert sorted(model.__dict__) == before


def test_empty_data_is_refused() -> None:
    assert "empty" in _refused(dense(), recipe(INT8), np.zeros((0, 6), np.float32))
    assert "empty" in _refused(dense(), recipe(INT8), iter(()))


def test_data_of_another_shape_is_refused() -> None:
    _refused(dense(), recipe(INT8), np.zeros((4, 7), np.float32))


def test_pruning_at_once_begins_with_what_data_says() -> None:
    """Inputs that stand in for each other: the outputs suffer far less than under magnitude's zeros."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((256, 2)) @ rng.standard_normal((2, 6)) + 0.1 * rng.standard_normal((256, 6))).astype("f")
    wanted, lost = dense().predict(x, verbose=0), []
    for samples in (None, x):
        model = dense()
        paring.attach(model, recipe(PRUNE, name="one"), samples)
        assert (model.get_layer("one").kernel.numpy() == 0).mean() == (0.5 if samples is not None else 0.0)
        lost.append(float(np.square(model.predict(x, verbose=0) - wanted).sum()))
        assert (paring.finalize(model).get_layer("one").kernel.numpy() == 0).mean() == 0.5
    assert lost[1] < 0.25 * lost[0]


def test_shares_by_error_meet_the_budget_and_come_back_with_the_file(tmp_path: Path) -> None:
    x, y = data()
    model, by_error = dense(), recipe({"sparsify": {"sparsity": 0.5, "allocation": "error"}})
    with pytest.raises(InputError, match="share zeros out by error"):
        paring.attach(model, by_error)
    paring.attach(model, by_error, x)
    compiled(model).fit(x, y, verbose=0)
    zeros = [layer.kernel.numpy() == 0 for layer in (model.get_layer("one"), model.get_layer("two"))]
    assert sum(z.sum() for z in zeros) == pytest.approx(0.5 * sum(z.size for z in zeros), abs=2)
    model.save(tmp_path / "m.keras")
    again = paring.load_model(tmp_path / "m.keras")
    again.fit(x, y, verbose=0)
    for name, before in zip(("one", "two"), zeros, strict=True):
        assert np.array_equal(again.get_layer(name).kernel.numpy() == 0, before)


def test_weights_are_as_before_where_attaching_fails_behind_the_choice_of_zeros() -> None:
    model = dense()
    before = portrait(model)
    with pytest.raises(InputError, match="layer of at least 4 outputs"):
        paring.attach(model, recipe({"sparsify": {"sparsity": 0.5, "pattern": "4x1"}}), data()[0])
    assert same(before, portrait(model))


@pytest.mark.parametrize(
    ("name", "shape", "options"),
    [
        ("Conv2D", (7, 9, 4), {"kernel_size": (3, 2), "strides": (2, 1), "padding": "same"}),
        ("Conv2D", (7, 9, 4), {"kernel_size": 3, "dilation_rate": 2, "padding": "valid", "groups": 2}),
        ("Conv1D", (9, 4), {"kernel_size": 3, "strides": 2, "padding": "same"}),
        ("Dense", (9, 4), {}),
    ],
)
def test_moments_are_those_of_what_the_weights_meet(name: str, shape: tuple[int, ...], options: dict[str, Any]) -> None:
    """The variance of each output follows from the covariance of the inputs, exactly where every position is seen."""
    from paring.training.layouts import parts_of
    from paring.training.moments import grams

    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    layer = getattr(keras.layers, name)(6, **options)
    model = keras.Model(inputs, layer(inputs))
    x = np.random.default_rng(0).standard_normal((8, *shape)).astype(np.float32) + 1
    gram = grams(model, [layer], [x[:3], x[3:]])[layer]
    (part,) = parts_of(layer)
    rows = gram.unfolding.matrix(part.layout.matrix(np, layer.kernel.numpy()).reshape(gram.unfolding.shape))
    found = gram.unfolding.channels(np.einsum("grk,gkl,grl->gr", rows, gram.second, rows))
    made = model.predict(x, verbose=0).reshape(-1, 6)
    np.testing.assert_allclose(found, made.var(axis=0), rtol=2e-3)
    assert "call" not in layer.__dict__


def test_strict_names_what_would_stay_float() -> None:
    model = dense()
    before = portrait(model)
    with pytest.raises(BoundError, match="two"):
        paring.attach(model, recipe(INT8, name="one"), strict=True)
    assert same(before, portrait(model))


def test_export_before_any_range_was_seen_is_refused(tmp_path: Path) -> None:
    model = dense()
    paring.attach(model, recipe(INT8))
    with pytest.raises(InputError, match="never seen"):
        paring.export(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_export_of_a_range_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = dense()
    attachment = paring.attach(model, recipe(INT8), data()[0])
    name = next(n for n in attachment.state.named if n.startswith("range/"))
    attachment.state.named[name].assign([-1.0, np.inf])
    with pytest.raises(InputError, match="not finite"):
        paring.export(model, tmp_path / "m.tflite")
    assert not list(tmp_path.iterdir())


def test_what_has_no_attachment_is_said(tmp_path: Path) -> None:
    model = dense()
    for act in (lambda: paring.export(model, tmp_path / "m.tflite"), lambda: paring.finalize(model)):
        with pytest.raises(InputError, match="nothing is attached"):
            act()
    model.save(tmp_path / "plain.keras")
    with pytest.raises(InputError, match="no recipe is in the file"):
        paring.load_model(tmp_path / "plain.keras")
    (tmp_path / "broken.keras").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"broken\.keras"):
        paring.load_model(tmp_path / "broken.keras")


# -- what stays, and what is taken away --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stages", [[PRUNE], [CLUSTER], [INT8], [PRUNE, CLUSTER, INT8]], ids=["prune", "cluster", "qat", "chain"]
)
def test_attach_leaves_no_trace_that_finalize_does_not_take_away(stages: list[dict[str, Any]], tmp_path: Path) -> None:
    model = compiled(dense())
    x, y = data()
    model.fit(x, y, verbose=0)  # the optimizer is built before there are extras
    model.predict(x, verbose=0)
    names, plain = [v.path for v in model.weights], portrait(model)
    paring.attach(model, recipe(*stages), x)
    assert [layer.name for layer in model.layers] == [layer.name for layer in dense().layers]
    assert len(model.get_weights()) == len(names) and model.count_params() == sum(v.size for v in plain[2][:4])
    model.set_weights(model.get_weights())
    model.fit(x, y, epochs=2, verbose=0)
    shown = model.predict(x, verbose=0)
    finished = paring.finalize(model)
    assert finished is model and [v.path for v in model.weights] == names
    assert portrait(model)[:2] == plain[:2]
    if INT8 not in stages:
        assert np.allclose(model.predict(x, verbose=0), shown, atol=1e-5)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.models.load_model(tmp_path / "m.keras")
    assert np.allclose(again.predict(x, verbose=0), model.predict(x, verbose=0), atol=1e-6)
    keras.models.clone_model(model)
    paring.attach(model, recipe(*stages), x)
    model.fit(x, y, verbose=0)


def test_an_optimizer_that_trained_keeps_what_it_knows() -> None:
    """Adam's momentum goes on where it was, and the centers that are new to it train."""
    model = compiled(dense())
    x, y = data()
    model.fit(x, y, verbose=0)
    momentum = np.array(model.optimizer._momentums[0])
    attachment = paring.attach(model, recipe(CLUSTER))
    assert np.array_equal(momentum, np.array(model.optimizer._momentums[0]))
    assert int(model.optimizer.iterations) == 1
    before = {n: np.array(v) for n, v in attachment.state.named.items() if n.endswith("shift")}
    model.fit(x, y, verbose=0)
    assert before and all(not np.array_equal(v, np.array(attachment.state.named[n])) for n, v in before.items())


def test_keras_loads_the_file_as_the_plain_model(tmp_path: Path) -> None:
    model = compiled(dense())
    x, y = data()
    paring.attach(model, recipe(PRUNE, CLUSTER, INT8), x)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "m.keras")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = keras.models.load_model(tmp_path / "m.keras")
    assert not [str(w.message) for w in caught]
    assert [layer.name for layer in plain.layers] == [layer.name for layer in dense().layers]
    assert np.mean(np.array(plain.get_layer("one").kernel) == 0) == 0.5
    plain.fit(x, y, verbose=0)


def test_checkpoints_hold_zeros_and_go_on(tmp_path: Path) -> None:
    x, y = data()

    def fresh() -> Any:
        model = compiled(dense())
        paring.attach(model, recipe(LATER, CLUSTER, INT8), x)
        return model

    def fit(model: Any, epochs: int, *callbacks: Any, initial: int = 0) -> list[float]:
        done = model.fit(
            x, y, 8, epochs=epochs, initial_epoch=initial, shuffle=False, verbose=0, callbacks=list(callbacks)
        )
        return [float(v) for v in done.history["loss"]]

    whole = fresh()
    wanted = fit(whole, 4)
    model = fresh()
    files = keras.callbacks.ModelCheckpoint(tmp_path / "e{epoch}.keras")
    values = keras.callbacks.ModelCheckpoint(tmp_path / "e{epoch}.weights.h5", save_weights_only=True)
    fit(model, 2, files, values)
    again = paring.load_model(tmp_path / "e2.keras")
    assert np.mean(np.array(again.get_layer("one").kernel) == 0) == 0.5
    assert np.allclose(fit(again, 4, initial=2), wanted[2:], rtol=1e-5)
    other = fresh()
    other.optimizer.build(other.trainable_variables)
    other.load_weights(tmp_path / "e2.weights.h5")
    assert np.mean(np.array(other.get_layer("one").kernel) == 0) == 0.5
    assert np.allclose(fit(other, 4, initial=2), wanted[2:], rtol=1e-5)

    class Stopped(keras.callbacks.Callback):  # type: ignore[name-defined, misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise KeyboardInterrupt

    stopped = fresh()
    backup = str(tmp_path / "backup")
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, 4, keras.callbacks.BackupAndRestore(backup), Stopped())
    restored = fresh()
    assert np.allclose(fit(restored, 4, keras.callbacks.BackupAndRestore(backup)), wanted[2:], rtol=1e-5)


def test_the_deployed_form_of_a_layer_with_softmax_is_that_of_the_file(tmp_path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter

    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), name="features")
    x = keras.layers.Dense(8, activation="relu", name="one")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(3, activation="softmax", name="two")(x))
    samples, _ = data()
    paring.attach(model, recipe(INT8), samples)
    paring.export(model, tmp_path / "m.tflite", verified=False)
    run = Interpreter(str(tmp_path / "m.tflite"))
    run.resize_tensor_input(run.get_input_details()[0]["index"], samples.shape)
    run.allocate_tensors()
    run.set_tensor(run.get_input_details()[0]["index"], samples)
    run.invoke()
    written = run.get_tensor(run.get_output_details()[0]["index"])
    assert np.abs(written - np.asarray(model(samples, training=False))).max() <= 1 / 256
    assert np.ptp(written) > 0.1
