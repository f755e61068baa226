"""What runs in place of an operation's `call`: its steps with sites between, its weights as they are to be seen."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import keras
from keras import ops
from keras.src.backend import AutocastScope  # keeps mixed precision out of the arithmetic on integers

from paring.compress.straight import through
from paring.training.attachment import ANNOTATE, NORMAL, Attachment
from paring.training.layouts import name_of
from paring.training.sites import ACTIVE, ATTENTION, LINEAR, SUMS, Site
from paring.training.steps import POOLED, STEPS, activated, attention, combined, pooled, stepwise
from paring.training.weights import Compressed, Flat, normalizing, normalizing_codes, showing

Call = Callable[..., Any]


def replace(attachment: Attachment, owner: Any, name: str, function: Call) -> None:
    """Puts a function in place of a method, and remembers how to undo it."""
    before = owner.__dict__.get(name)
    made = functools.wraps(getattr(owner, name))(function)
    made.attachment = attachment  # type: ignore[attr-defined]
    setattr(owner, name, made)

    def undo() -> None:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)

    attachment.undo.append(undo)


def works_in(layer: Any) -> Any:
    """The attachment that a layer has part in, None without one."""
    return getattr(vars(layer).get("call"), "attachment", None)


def patch_model(attachment: Attachment, call: Call) -> None:
    """The whole model: asks for the phase, and quantizes what comes in."""
    found = attachment.sites.inputs

    names = list(inspect.signature(attachment.model.call).parameters)
    place = names.index("training") - 1 if "training" in names else None

    def whole(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        training = args[place] if place is not None and place < len(args) else kwargs.get("training")
        with attachment.phase(training):
            flat = keras.tree.flatten(inputs)
            flat = [attachment.at(found[n], _tensor(x)) if n in found else x for n, x in enumerate(flat)]
            return call(keras.tree.pack_sequence_as(inputs, flat), *args, **kwargs)

    replace(attachment, attachment.model, "call", whole)
    flat = attachment.model._flatten_layers  # of which `layers` are
    replace(
        attachment, attachment.model, "_flatten_layers",
        lambda *args, **kwargs: [layer for layer in flat(*args, **kwargs) if layer is not attachment.state],
    )  # fmt: skip
    for name in ("summary", "count_params", "get_weights", "set_weights"):
        replace(attachment, attachment.model, name, attachment.state.hiding(getattr(attachment.model, name)))


def _tensor(x: Any) -> Any:
    """Arrays reach a functional model as they are."""
    return x if keras.ops.is_tensor(x) else ops.convert_to_tensor(x, keras.config.floatx())


def patch(attachment: Attachment, op: Any, compressed: Compressed | None) -> None:
    """One operation.

    Args:
      attachment: Where it belongs to.
      op: A Keras layer or operation.
      compressed: Its weights, None for one without.
    """
    sites = attachment.sites
    inside = [s.root() for s in sites.inside.get(op, ())]
    outputs = sites.outputs.get(op, ())
    run: Call = op.call
    if name_of(op) == "BatchNormalization":
        run = _normalized(attachment, op, run, folds=op in sites.folded.values())
    elif name_of(op) in STEPS and (inside or op in sites.reads):
        run = functools.partial(STEPS[name_of(op)], attachment, op, inside)
    elif name_of(op) in ATTENTION and inside:
        original = op._compute_attention
        replace(attachment, op, "_compute_attention", functools.partial(attention, attachment, op, inside, original))
    elif type(op).__name__ in ACTIVE:
        run = activated(attachment, op, inside) or run
    elif name_of(op) in POOLED and outputs:
        run = pooled(attachment, outputs[0], run)
    elif name_of(op) in SUMS and inside:
        run = stepwise(attachment, op, inside, run)
    elif op in sites.reads:
        run = combined(attachment, op, sites.reads[op], run)
    if compressed is not None:
        two = compressed.factored
        run = _factored(attachment, compressed, inside) if two else _with_weights(attachment, compressed, run)
        run = _reads_bfloat16(attachment, run) if compressed.bfloat16 else run
    if type(op).__name__ not in ACTIVE and (op in sites.before or activated(attachment, op, inside)):
        run = _with_activation(attachment, op, run, sites.before.get(op), inside)
    if op in sites.entries:
        run = _entered(attachment, sites.entries[op], run)
    number = attachment.labels.get(op)

    def patched(*args: Any, **kwargs: Any) -> Any:
        with _labelled(number, op, attachment):
            made = run(*args, **kwargs)
            flat = keras.tree.flatten(made)
            if not any(outputs) or len(flat) < len(outputs):
                return made
            flat = [attachment.at(site, x) for site, x in zip(outputs, flat, strict=False)] + flat[len(outputs) :]
            return keras.tree.pack_sequence_as(made, flat)

    replace(attachment, op, "call", patched)


def _labelled(number: int | None, op: Any, attachment: Attachment) -> Any:
    if number is None or attachment.mode != ANNOTATE:
        return nullcontext()
    from paring.training import marks  # TensorFlow: only where a model is exported

    return marks.label(number, op)


def _reads_bfloat16(attachment: Attachment, run: Call) -> Call:
    """Activations rounded to bfloat16, straight through; a `.tflite` file has no such kernels and gets floats."""

    def rounded(x: Any, *args: Any, **kwargs: Any) -> Any:
        if attachment.mode == NORMAL or attachment.rounds:
            x = ops.convert_to_tensor(x)
            short = ops.cast(ops.cast(x, "bfloat16"), x.dtype)
            x = short if attachment.rounds else through(ops, short, x)
        return run(x, *args, **kwargs)

    return rounded


def _entered(attachment: Attachment, site: Site, run: Call) -> Call:
    return lambda x, *args, **kwargs: run(attachment.at(site, x), *args, **kwargs)


def _with_weights(attachment: Attachment, compressed: Compressed, run: Call) -> Call:
    layer = compressed.layer
    watched = {id(v): v for v in (*layer.variables, *attachment.state.named.values())}
    flat = compressed.flat
    exact = name_of(layer) in LINEAR and (flat is not None or name_of(layer) != "EinsumDense")

    def projected(*args: Any, **kwargs: Any) -> Any:
        training = attachment.training
        whole = None
        if not training and attachment.mode == NORMAL and exact:
            scale = attachment.scale(attachment.source(layer))
            whole = compressed.codes(scale) if scale is not None else None
        if whole is not None:
            sink = attachment.scale(attachment.sites.sink(layer))
            form = functools.partial(_flat, layer, flat, lambda made: made) if flat is not None else run
            if len(compressed.targets) > 1:
                middle, scale = attachment.sites.inside[layer][0], attachment.scale(attachment.sites.source[layer])
                first, unit = compressed.first_codes(scale)
                whole[0].append(first)
                form = functools.partial(form, between=functools.partial(_between, attachment, layer, middle, unit))
            return _in_integers(layer, form, whole, (scale, sink), watched, args, kwargs)
        if attachment.mode == ANNOTATE:
            shown, added = attachment.frozen[layer]
            shown = [(v, ops.convert_to_tensor(value)) for v, value in shown]
        else:
            step = attachment.step() if training else None
            scale = None if training else attachment.scale(attachment.source(layer))
            shown, added = compressed.values(training=training, step=step, scale=scale)
        form = run
        if flat is not None and attachment.mode == ANNOTATE:
            # Marked in front of the reshape, which keeps relu from fusing.
            form = functools.partial(_flat, layer, flat, functools.partial(attachment.at, attachment.sites.sink(layer)))
        with showing(shown, watched, layer):
            made = form(*args, **kwargs)
        return made if added is None else made + _along(layer, added, made)

    return projected


def _flat(layer: Any, flat: Flat, mark: Call, x: Any, *_: Any, **__: Any) -> Any:
    """A dense layer on more than two dimensions as one product of matrices, which the converter makes one operator."""
    kernel = ops.reshape(ops.convert_to_tensor(flat.kernel), (flat.inputs, flat.outputs))
    lead = ops.shape(x)[1 : len(x.shape) - flat.summed]
    wide = bool(lead) or flat.summed > 1
    made = ops.matmul(ops.reshape(x, (-1, flat.inputs)) if wide else x, kernel)
    if layer.bias is not None:
        made = made + ops.reshape(layer.bias, (-1,))
    made = mark(layer.activation(made) if layer.activation is not None else made)
    return ops.reshape(made, (-1, *lead, *flat.shape)) if wide or len(flat.shape) > 1 else made


def _factored(attachment: Attachment, compressed: Compressed, inside: list[Site]) -> Call:
    """A layer whose weight is a product: one thin layer behind the other, in training as in the file."""
    layer, flat, part = compressed.layer, compressed.flat, compressed.targets[0].part
    middle = inside[0] if inside else None

    def products(x: Any, left: Any, right: Any) -> Any:
        rank = int(right.shape[0])
        if flat is None:
            shape = (*part.shape[:-1], rank)
            thin = layer.convolution_op(x, ops.cast(part.layout.weight(ops, right, shape), x.dtype))
            last = ops.reshape(ops.transpose(left), (*[1] * layer.rank, rank, -1))
            return ops.conv(attachment.at(middle, thin), ops.cast(last, x.dtype), data_format=layer.data_format)
        thin = attachment.at(middle, ops.matmul(x, ops.cast(ops.transpose(right), x.dtype)))
        return ops.matmul(thin, ops.cast(ops.transpose(left), x.dtype))

    def run(x: Any, *_: Any, **__: Any) -> Any:
        training = attachment.training
        if attachment.mode == ANNOTATE:
            left, right, bias = (None if v is None else ops.convert_to_tensor(v) for v in attachment.frozen[layer])
        else:
            step = attachment.step() if training else None
            left, right, bias = compressed.factors(training=training, step=step)
        x = ops.convert_to_tensor(x, layer.compute_dtype)
        lead = ops.shape(x)[1 : len(x.shape) - (flat.summed if flat is not None else 1)]
        wide = flat is not None and (bool(lead) or flat.summed > 1)
        made = products(ops.reshape(x, (-1, flat.inputs)) if flat is not None and wide else x, left, right)
        made = made if bias is None else made + _along(layer, bias, made)
        made = layer.activation(made) if layer.activation is not None else made
        if flat is None or not (wide or len(flat.shape) > 1):
            return made
        made = attachment.at(attachment.sites.sink(layer), made) if attachment.mode == ANNOTATE else made
        return ops.reshape(made, (-1, *lead, *flat.shape))

    return run


def _along(layer: Any, values: Any, made: Any) -> Any:
    """One value per output channel, to be broadcast over a layer's result."""
    values = ops.cast(values, made.dtype)
    if getattr(layer, "data_format", None) == "channels_first":
        return ops.reshape(values, (-1, *[1] * (len(made.shape) - 2)))
    return values


def _in_integers(layer: Any, run: Call, whole: Any, scales: Any, watched: Any, args: Any, kwargs: Any) -> Any:
    """The layer on codes of its input and weights: its sums are those of the integer kernel, and only then real numbers.

    Where the grid of the result is known they are rounded here, by XNNPACK's arithmetic: one float32 factor per channel.
    """
    shown, added, unit = whole
    scale, sink = scales
    plain = getattr(layer, "activation", None)

    def real(sums: Any) -> Any:
        sums = sums if added is None else sums + _along(layer, added, sums)
        sums = _requantized(sums, _along(layer, unit, sums), sink)
        return sums if plain is None else plain(sums)

    codes = ops.cast(args[0], "float32") / scale
    layer.activation, keep = real, layer.__dict__.get("activation")
    try:
        with AutocastScope(None), showing(shown, watched, layer):  # codes are float32 under every policy
            made = run(through(ops, ops.round(codes), codes), *args[1:], **kwargs)
    finally:
        layer.activation = keep
    return ops.cast(made, layer.compute_dtype)


def _requantized(sums: Any, unit: Any, step: Any) -> Any:
    """Sums of products of codes as real numbers; on the grid of their result, where it is known, as XNNPACK rounds them."""
    if step is None:
        return sums * unit
    codes = sums * (unit / step)
    return through(ops, ops.round(codes), codes) * step


def _between(attachment: Attachment, layer: Any, site: Site, unit: Any, sums: Any) -> Any:
    """What a separable convolution's depthwise part gives its pointwise one: codes, of sums of codes."""
    step = attachment.scale(site)
    codes = attachment.at(site, _requantized(sums, _along(layer, unit, sums), step)) / step
    return through(ops, ops.round(codes), codes)


def _normalized(attachment: Attachment, norm: Any, run: Call, *, folds: bool) -> Call:
    """Batch normalization: alive in training; deployed it is in the layer before, or a depthwise convolution of its own."""
    source = attachment.sites.alone.get(norm)
    own = norm in attachment.sites.alone and (bool(attachment.sites.outputs.get(norm)) or norm in attachment.labels)

    def normalized(x: Any, *args: Any, **kwargs: Any) -> Any:
        if attachment.training:
            return run(x, *args, **kwargs)
        if folds:
            return x
        scale = attachment.scale(source)
        if not own or len(x.shape) != 4 or norm.axis not in (3, -1):
            mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
            return run(x, training=False, mask=mask)  # also where the model's code says True at all times
        if scale is not None and attachment.mode == NORMAL:
            factor, shift, unit = normalizing_codes(norm, scale)
            codes = ops.cast(x, "float32") / scale
            sums = through(ops, ops.round(codes), codes) * factor + shift
            return ops.cast(_requantized(sums, unit, attachment.scale(attachment.sites.sink(norm))), x.dtype)
        factor, shift = attachment.frozen[norm] if attachment.mode == ANNOTATE else normalizing(norm, scale)
        kernel = ops.cast(ops.reshape(factor, (1, 1, -1, 1)), x.dtype)
        return ops.depthwise_conv(x, kernel) + ops.cast(shift, x.dtype)

    return normalized


def _with_activation(attachment: Attachment, layer: Any, run: Call, before: Site | None, inside: list[Site]) -> Call:
    plain = layer.activation
    form = activated(attachment, layer, inside) or plain

    def activation(x: Any) -> Any:
        return form(attachment.at(before, x))

    def run_with(*args: Any, **kwargs: Any) -> Any:
        layer.activation = activation
        try:
            return run(*args, **kwargs)
        finally:
            layer.activation = plain

    return run_with
