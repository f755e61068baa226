"""What runs in place of an operation's `call`: its steps with sites between, its weights as they are to be seen."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import keras
from keras import ops

from paring.training.attachment import ANNOTATE, CALIBRATE, NORMAL, Attachment
from paring.training.layouts import name_of
from paring.training.sites import ACTIVE, Site, activation_of
from paring.training.weights import Compressed, folding, on_grid, showing

Call = Callable[..., Any]
_BIG = 1e9


def replace(attachment: Attachment, owner: Any, name: str, function: Call) -> None:
    """Puts a function in place of a method, and remembers how to undo it."""
    before = owner.__dict__.get(name)
    setattr(owner, name, functools.wraps(getattr(owner, name))(function))

    def undo() -> None:
        delattr(owner, name)
        if before is not None:
            setattr(owner, name, before)

    attachment.undo.append(undo)


def patch_model(attachment: Attachment, call: Call) -> None:
    """The whole model: asks for the phase, and quantizes what comes in."""
    found = attachment.sites.inputs

    def whole(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        with attachment.phase():
            flat = keras.tree.flatten(inputs)
            flat = [attachment.at(found.get(n), x) if n in found else x for n, x in enumerate(flat)]
            return call(keras.tree.pack_sequence_as(inputs, flat), *args, **kwargs)

    replace(attachment, attachment.model, "call", whole)


def patch(attachment: Attachment, op: Any, compressed: Compressed | None, call: Call | None = None) -> None:
    """One operation.

    Args:
      attachment: Where it belongs to.
      op: A Keras layer or operation.
      compressed: Its weights, None for one without.
      call: What to run for its own `call`.
    """
    sites = attachment.sites
    inside = [s.root() for s in sites.inside.get(op, ())]
    outputs = sites.outputs.get(op, ())
    run = call or op.call
    norm_of = {norm: layer for layer, norm in sites.folded.items()}
    if name_of(op) == "BatchNormalization":
        run = _normalized(attachment, op, run, folds=op in norm_of)
    elif name_of(op) in _STEPS and inside:
        run = functools.partial(_STEPS[name_of(op)], attachment, op, inside)
    elif name_of(op) in ("MultiHeadAttention", "GroupedQueryAttention") and inside:
        original = op._compute_attention
        replace(attachment, op, "_compute_attention", functools.partial(_attention, attachment, op, inside, original))
    elif type(op).__name__ in ACTIVE:
        if activation_of(op) in _GATED and inside:
            run = functools.partial(_GATED[activation_of(op)], attachment, inside[-1])
    elif name_of(op) in _POOLED and outputs:
        run = _pooled(attachment, outputs[0], run)
    if type(op).__name__ not in ACTIVE and (op in sites.before or (activation_of(op) in _GATED and inside)):
        run = _with_activation(attachment, op, run, sites.before.get(op), inside)
    if compressed is not None:
        run = _with_weights(attachment, compressed, run)
    if op in sites.entries:
        run = _entered(attachment, sites.entries[op], run)
    label = f"paring{attachment.labels[op]}" if op in attachment.labels else ""

    def patched(*args: Any, **kwargs: Any) -> Any:
        scope = _scope(label) if label and attachment.mode == ANNOTATE else nullcontext()
        with scope:
            made = run(*args, **kwargs)
            flat = keras.tree.flatten(made)
            if not any(outputs) or len(flat) < len(outputs):
                return made
            flat = [attachment.at(site, x) for site, x in zip(outputs, flat, strict=False)] + flat[len(outputs) :]
            return keras.tree.pack_sequence_as(made, flat)

    replace(attachment, op, "call", patched)


@contextmanager
def _scope(label: str) -> Iterator[None]:
    """Names of what is made inside tell the writer to which operation it belongs."""
    import tensorflow as tf

    with tf.name_scope(label):
        yield


def _entered(attachment: Attachment, site: Site, run: Call) -> Call:
    return lambda x, *args, **kwargs: run(attachment.at(site, x), *args, **kwargs)


def _with_weights(attachment: Attachment, compressed: Compressed, run: Call) -> Call:
    layer = compressed.layer
    watched = {id(v): v for v in (*layer.variables, *attachment.state.named.values())}

    def projected(*args: Any, **kwargs: Any) -> Any:
        if attachment.mode not in (NORMAL, CALIBRATE, ANNOTATE):
            return run(*args, **kwargs)
        training = attachment.training
        if attachment.mode == ANNOTATE:
            shown, added = attachment.frozen[layer]
            shown = [(v, ops.convert_to_tensor(value)) for v, value in shown]
        else:
            step = attachment.step() if training else None
            scale = None if training else attachment.scale(attachment.source(layer))
            shown, added = compressed.values(training=training, step=step, scale=scale)
        own = {id(v) for v, _ in shown}
        with showing(shown, [v for i, v in watched.items() if i not in own], layer):
            made = run(*args, **kwargs)
        if added is None:
            return made
        if getattr(layer, "data_format", None) == "channels_first":
            added = ops.reshape(added, (-1, *[1] * (len(made.shape) - 2)))
        return made + ops.cast(added, made.dtype)

    return projected


def _normalized(attachment: Attachment, norm: Any, run: Call, *, folds: bool) -> Call:
    """Batch normalization: alive in training; deployed it is in the layer before, or a depthwise convolution of its own."""
    source = attachment.sites.alone.get(norm)
    own = bool(attachment.sites.outputs.get(norm)) or norm in attachment.labels

    def normalized(x: Any, *args: Any, **kwargs: Any) -> Any:
        if attachment.training:
            return run(x, *args, **kwargs)
        if folds:
            return x
        scale = attachment.scale(source)
        if not own or len(x.shape) != 4 or norm.axis not in (3, -1):
            return run(x, *args, **kwargs)
        factor, shift = folding(norm)
        if scale is not None:
            shift = on_grid(shift, scale, ops.reshape(factor, (-1, 1)), 127)
        kernel = ops.cast(ops.reshape(factor, (1, 1, -1, 1)), x.dtype)
        return ops.depthwise_conv(x, kernel) + ops.cast(shift, x.dtype)

    return normalized


def _with_activation(attachment: Attachment, layer: Any, run: Call, before: Site | None, inside: list[Site]) -> Call:
    plain = layer.activation
    gated = _GATED.get(activation_of(layer))

    def activation(x: Any) -> Any:
        x = attachment.at(before, x)
        return gated(attachment, inside[-1], x) if gated is not None and inside else plain(x)

    def run_with(*args: Any, **kwargs: Any) -> Any:
        layer.activation = activation
        try:
            return run(*args, **kwargs)
        finally:
            layer.activation = plain

    return run_with


# -- operations that a file has as several ---------------------------------------------------------------------------


def _silu(attachment: Attachment, gate: Site, x: Any) -> Any:
    return x * attachment.at(gate, ops.sigmoid(x))


def _hard_sigmoid(attachment: Attachment, gate: Site, x: Any) -> Any:
    return attachment.at(gate, ops.relu6(x + 3.0)) * (1 / 6)


def _separable(attachment: Attachment, layer: Any, inside: list[Site], x: Any) -> Any:
    options: dict[str, Any] = {"data_format": layer.data_format}
    strides = layer.strides if len(set(layer.strides)) > 1 else layer.strides[0]
    x = ops.depthwise_conv(
        x, layer.depthwise_kernel, strides=strides, padding=layer.padding, dilation_rate=layer.dilation_rate, **options
    )
    x = attachment.at(inside[0], x)
    x = ops.conv(x, layer.pointwise_kernel, strides=1, padding="valid", **options)
    if layer.use_bias:
        first = layer.data_format == "channels_first"
        x = x + ops.reshape(layer.bias, (-1, *[1] * layer.rank)) if first else x + ops.convert_to_tensor(layer.bias)
    return layer.activation(x) if layer.activation is not None else x


def _rescaling(attachment: Attachment, layer: Any, inside: list[Site], x: Any) -> Any:
    scale, offset = (ops.cast(v, layer.compute_dtype) for v in (layer.scale, layer.offset))
    return attachment.at(inside[0], ops.cast(x, layer.compute_dtype) * scale) + offset


def _normalization(attachment: Attachment, layer: Any, inside: list[Site], x: Any) -> Any:
    mean = ops.cast(ops.convert_to_tensor(layer.mean), layer.compute_dtype)
    deviation = ops.maximum(ops.sqrt(ops.cast(ops.convert_to_tensor(layer.variance), layer.compute_dtype)), keras.config.epsilon())
    x = ops.cast(x, layer.compute_dtype)
    if layer.invert:
        return attachment.at(inside[0], x * deviation) + mean
    return attachment.at(inside[0], x - mean) * (1 / deviation)


def _attention(
    attachment: Attachment, layer: Any, inside: list[Site], original: Call, query: Any, key: Any, value: Any,
    attention_mask: Any = None, training: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """Scaled dot product attention in the steps that a file has; with a mask between them they stay float."""
    if attention_mask is not None or options.get("use_causal_mask") or len(query.shape) != 4:
        made = original(query, key, value, attention_mask=attention_mask, training=training, **options)
        return (attachment.at(inside[2], made[0]), *made[1:])
    bits = inside[0].bits
    query = attachment.at(inside[0], query * (1 / float(query.shape[-1]) ** 0.5))
    scores = attachment.at(inside[1], ops.einsum("btnh,bsnh->bnts", query, key))
    shares = attachment.at(Site("softmax", bits, (0.0, 255 / 256) if bits == 8 else (-1.0, 32767 / 32768)), ops.softmax(scores))
    dropout = getattr(layer, "_dropout_layer", None)
    dropped = dropout(shares, training=training) if dropout is not None else shares
    made = attachment.at(inside[2], ops.einsum("bnts,bsnh->btnh", dropped, value))
    return made, shares


def _pooled(attachment: Attachment, site: Site | None, run: Call) -> Call:
    """Averages of integers: on codes they are exact, so that a tie is a tie as it is for the kernel."""

    def pooled(x: Any, *args: Any, **kwargs: Any) -> Any:
        scale = None if attachment.training or attachment.mode != NORMAL else attachment.scale(site)
        if scale is None:
            return run(x, *args, **kwargs)
        codes = x / scale
        return run(codes + ops.stop_gradient(ops.round(codes) - codes), *args, **kwargs) * scale

    return pooled


_GATED = {"silu": _silu, "hard_sigmoid": _hard_sigmoid}
_STEPS = {
    "SeparableConv1D": _separable, "SeparableConv2D": _separable, "Rescaling": _rescaling, "Normalization": _normalization,
}  # fmt: skip
_POOLED = ("AveragePooling1D", "AveragePooling2D")
