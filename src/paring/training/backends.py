"""What backends need so that steps and zeros follow the optimizer."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from paring.training import calls
from paring.training.attachment import Attachment


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

    def stepped(state: Any, data: Any) -> Any:
        trainable, others, optimizer, metrics = state
        names = [id(v) for v in model.non_trainable_variables]
        counter = names.index(id(attachment.state.named["step"]))
        iterations = next(n for n, v in enumerate(model.optimizer.variables) if v is model.optimizer._iterations)
        others = [*others]
        others[counter] = ops.cast(optimizer[iterations], "float32")
        logs, (trainable, others, optimizer, metrics) = step((trainable, others, optimizer, metrics), data)
        trained = [id(v) for v in model.trainable_variables]
        mapping = list(zip(model.non_trainable_variables, others, strict=True))
        mapping += list(zip(model.trainable_variables, trainable, strict=True))
        with keras.StatelessScope(mapping):
            for variable, held in attachment.holds:
                place = trained.index(id(variable)) if id(variable) in trained else None
                if place is not None:
                    trainable[place] = held(trainable[place])
        return logs, (trainable, others, optimizer, metrics)

    return stepped


def extend_optimizer(model: Any) -> None:
    """Gives an optimizer that was built before variables for what a recipe trains; what it knows stays."""
    old = model.optimizer
    wanted = model.trainable_variables
    if not old.built or not wanted or len(old._trainable_variables) == len(wanted):
        return
    new = type(old).from_config(old.get_config())
    new.build(wanted)
    known = {v.path: v for v in old.variables}
    for variable in new.variables:
        if variable.path in known:
            variable.assign(known[variable.path])
    model.optimizer = new
