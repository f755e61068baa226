"""What backends need so that steps and zeros follow the optimizer."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from paring.training import calls
from paring.training.attachment import Attachment
from paring.training.state import ATTRIBUTE


def follow(attachment: Attachment) -> None:
    """Lets pruned weights stay zero behind each optimizer step; on JAX also carries the optimizer's counter into the step."""
    for compressed in attachment.compressed.values():
        for target in compressed.targets:
            _hold(attachment, target)
    if keras.backend.backend() == "jax":
        calls.replace(attachment, attachment.model, "train_step", _jax_step(attachment, attachment.model.train_step))


def _hold(attachment: Attachment, target: Any) -> None:
    variable = target.part.variable
    trained = [v for v in target.extras.values()]
    if not trained:
        return
    before = variable.constraint

    def held(value: Any) -> Any:
        value = before(value) if before is not None else ops.convert_to_tensor(value)
        matrix = target.part.layout.matrix(ops, value)
        now = {name: ops.convert_to_tensor(v) for name, v in target.extras.items()}
        kept = target.algorithm.hold(ops, matrix, now, target.context)
        return value if kept is None else target.weight(kept)

    attachment.holds.append((variable, held))
    if keras.backend.backend() != "jax":
        variable.constraint = held
        attachment.undo.append(lambda: setattr(variable, "constraint", before))


def _jax_step(attachment: Attachment, step: Any) -> Any:
    """A stateless step cannot read variables: what it needs is put among, and taken from, the values it is given."""
    model = attachment.model

    def counted(optimizer: Any) -> Any:
        with keras.StatelessScope([*zip(model.optimizer.variables, optimizer, strict=True)]):
            return ops.cast(ops.convert_to_tensor(model.optimizer.iterations), "float32")

    def stepped(state: Any, data: Any) -> Any:
        trainable, others, optimizer, metrics = state
        now = counted(optimizer)  # also where an optimizer was exchanged, or loaded
        others = [now if v is attachment.state.named["step"] else value
                  for v, value in zip(model.non_trainable_variables, others, strict=True)]  # fmt: skip
        logs, (trainable, others, optimizer, metrics) = step((trainable, others, optimizer, metrics), data)
        trainable, others = attachment.carried(trainable, others, lambda _: counted(optimizer))
        return logs, (trainable, others, optimizer, metrics)

    return stepped


def refit_optimizer(optimizer: Any, added: Sequence[Any]) -> None:
    """Lets an optimizer that was built before train what a recipe trains, or no longer; what it knows of the others stays.

    It stays the same object, because loops of one's own hold it.

    Args:
      optimizer: A Keras optimizer; one that is not built yet needs nothing.
      added: The recipe's trained variables; empty to take them away.
    """
    if optimizer is None or not optimizer.built:
        return
    built = getattr(optimizer, "inner_optimizer", optimizer)._trainable_variables
    plain = [v for v in built if not v.path.startswith(f"{ATTRIBUTE}/")]
    if len(built) == len(plain) + len(added):
        return
    new = type(optimizer).from_config(optimizer.get_config())
    new.build([*plain, *added])
    old = [v for v in optimizer.variables if ATTRIBUTE not in v.path]
    for variable, known in zip([v for v in new.variables if ATTRIBUTE not in v.path], old, strict=True):
        variable.assign(known)
    optimizer.__dict__.clear()
    optimizer.__dict__.update(new.__dict__)


def renew_parameters(model: Any) -> None:
    """On PyTorch, `model.parameters()` are those of now."""
    if keras.backend.backend() == "torch":
        model._track_variables()


def store_apart(attachment: Attachment) -> None:
    """Files hold the optimizer of the plain model, so that Keras loads it without paring; the state holds the rest."""
    model = attachment.model
    if not attachment.state.trainable_variables:
        return

    def split() -> None:
        outer = getattr(model, "optimizer", None)
        for optimizer in (outer, getattr(outer, "inner_optimizer", None)):
            if optimizer is not None and "save_own_variables" not in optimizer.__dict__:
                calls.replace(attachment, optimizer, "save_own_variables", functools.partial(_save_plain, optimizer))
                calls.replace(attachment, optimizer, "load_own_variables", functools.partial(_load_plain, optimizer))

    compile_ = model.compile

    def compiled(*args: Any, **kwargs: Any) -> None:
        compile_(*args, **kwargs)
        split()

    calls.replace(attachment, model, "compile", compiled)
    split()


def _save_plain(optimizer: Any, store: Any) -> None:
    for number, variable in enumerate(v for v in optimizer.variables if ATTRIBUTE not in v.path):
        store[str(number)] = ops.convert_to_numpy(variable)


def _load_plain(optimizer: Any, store: Any) -> None:
    plain = [v for v in optimizer.variables if ATTRIBUTE not in v.path]
    if len(store.keys()) != len(plain):
        warnings.warn(
            f"Skipping variable loading for optimizer '{optimizer.name}', because it has {len(plain)} variables whereas the "
            f"saved optimizer has {len(store.keys())} variables.", stacklevel=2,
        )  # fmt: skip
        return
    for number, variable in enumerate(plain):
        variable.assign(store[str(number)])
