"""What runs in place of an operation's `call`: its steps with sites between, its weights as they are to be seen."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import keras
from keras import ops
from keras.src.backend import AutocastScope  # keeps mixed precision out of the arithmetic on integers

from paring.compress.straight import through
from paring.training.attachment import ANNOTATE, CALIBRATE, NORMAL, Attachment
from paring.training.layouts import name_of
from paring.training.sites import ACTIVE, LINEAR, SUMS, Site, activation_of
from paring.training.weights import Compressed, Flat, normalizing, showing

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
            run = functools.partial(_GATED[activation_of(op)], attachment, op, inside[-1])
    elif name_of(op) in _POOLED and outputs:
        run = _pooled(attachment, outputs[0], run)
    elif name_of(op) in SUMS and inside:
        run = _stepwise(attachment, op, inside, run)
    elif op in sites.reads:
        run = _combined(attachment, op, sites.reads[op], run)
    if compressed is not None:
        two = compressed.factored
        run = _factored(attachment, compressed, inside) if two else _with_weights(attachment, compressed, run)
        run = _reads_bfloat16(attachment, run) if compressed.bfloat16 else run
    if type(op).__name__ not in ACTIVE and (op in sites.before or (activation_of(op) in _GATED and inside)):
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
        if attachment.mode == NORMAL:
            x = ops.convert_to_tensor(x)
            x = through(ops, ops.cast(ops.cast(x, "bfloat16"), x.dtype), x)
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
        if attachment.mode not in (NORMAL, CALIBRATE, ANNOTATE):
            return run(*args, **kwargs)
        training = attachment.training
        whole = None
        if not training and attachment.mode == NORMAL and exact:
            scale = attachment.scale(attachment.source(layer))
            whole = compressed.codes(scale) if scale is not None else None
        if whole is not None:
            sink = attachment.scale(attachment.sites.sink(layer))
            form = functools.partial(_flat, layer, flat, lambda made: made) if flat is not None else run
            return _in_integers(layer, form, whole, (scale, sink), watched, args, kwargs)
        if attachment.mode == ANNOTATE:
            shown, added = attachment.frozen[layer]
            shown = [(v, ops.convert_to_tensor(value)) for v, value in shown]
        else:
            step = attachment.step() if training else None
            scale = None if training else attachment.scale(attachment.source(layer))
            shown, added = compressed.values(training=training, step=step, scale=scale)
        form = run
        if (
            flat is not None and attachment.mode == ANNOTATE
        ):  # marked in front of the reshape, which keeps relu from fusing
            form = functools.partial(_flat, layer, flat, functools.partial(attachment.at, attachment.sites.sink(layer)))
        made = _shown(layer, form, shown, watched, args, kwargs)
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


def _shown(layer: Any, run: Call, shown: Any, watched: Any, args: Any, kwargs: Any) -> Any:
    own = {id(v) for v, _ in shown}
    with showing(shown, [v for i, v in watched.items() if i not in own], layer):
        return run(*args, **kwargs)


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
        if sink is None:
            sums = sums * _along(layer, unit, sums)
        else:
            codes = sums * _along(layer, unit / sink, sums)
            sums = through(ops, ops.round(codes), codes) * sink
        return sums if plain is None else plain(sums)

    codes = ops.cast(args[0], "float32") / scale
    layer.activation, keep = real, layer.__dict__.get("activation")
    try:
        with AutocastScope(None):  # codes are float32 under every policy
            made = _shown(layer, run, shown, watched, (through(ops, ops.round(codes), codes), *args[1:]), kwargs)
    finally:
        layer.activation = keep
    return ops.cast(made, layer.compute_dtype)


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
        factor, shift = attachment.frozen[norm] if attachment.mode == ANNOTATE else normalizing(norm, scale)
        kernel = ops.cast(ops.reshape(factor, (1, 1, -1, 1)), x.dtype)
        return ops.depthwise_conv(x, kernel) + ops.cast(shift, x.dtype)

    return normalized


def _with_activation(attachment: Attachment, layer: Any, run: Call, before: Site | None, inside: list[Site]) -> Call:
    plain = layer.activation
    gated = _GATED.get(activation_of(layer))

    def activation(x: Any) -> Any:
        x = attachment.at(before, x)
        return gated(attachment, layer, inside[-1], x) if gated is not None and inside else plain(x)

    def run_with(*args: Any, **kwargs: Any) -> Any:
        layer.activation = activation
        try:
            return run(*args, **kwargs)
        finally:
            layer.activation = plain

    return run_with


# -- operations that a file has as several ---------------------------------------------------------------------------


def _silu(attachment: Attachment, op: Any, gate: Site, x: Any) -> Any:
    share, sites = attachment.at(gate, ops.sigmoid(x)), attachment.sites
    read, sinks = sites.before.get(op) or sites.reads.get(op, (None,))[0], sites.outputs.get(op) or (None,)
    return _exact(attachment, x * share, (x, share), (read, gate), sinks[0], _product)


def _hard_sigmoid(attachment: Attachment, op: Any, gate: Site, x: Any) -> Any:
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
    deviation = ops.maximum(
        ops.sqrt(ops.cast(ops.convert_to_tensor(layer.variance), layer.compute_dtype)), keras.config.epsilon()
    )
    x = ops.cast(x, layer.compute_dtype)
    if layer.invert:
        return attachment.at(inside[0], x * deviation) + mean
    return attachment.at(inside[0], x - mean) * (1 / deviation)


def _attention(
    attachment: Attachment, layer: Any, inside: list[Site], original: Call, query: Any, key: Any, value: Any,
    attention_mask: Any = None, training: Any = None, *rest: Any, **options: Any,
) -> Any:  # fmt: skip
    """Scaled dot product attention in the steps that a file has; a mask and the softmax behind it are float there."""
    if len(query.shape) != 4:
        made = original(query, key, value, attention_mask, training, *rest, **options)
        return (attachment.at(inside[2], made[0]), *made[1:])
    bits = inside[0].bits
    query = attachment.at(inside[0], query * (1 / float(query.shape[-1]) ** 0.5))
    scores = attachment.at(inside[1], ops.einsum("btnh,bsnh->bnts", query, key))
    if options.get("use_causal_mask"):
        attention_mask = layer._compute_causal_mask(query, value)
    shares = ops.softmax(scores) if attention_mask is None else layer._masked_softmax(scores, attention_mask)
    shares = attachment.at(Site("softmax", bits, (0.0, 255 / 256) if bits == 8 else (-1.0, 32767 / 32768)), shares)
    dropout = getattr(layer, "_dropout_layer", None)
    dropped = dropout(shares, training=training) if dropout is not None else shares
    made = attachment.at(inside[2], ops.einsum("bnts,bsnh->btnh", dropped, value))
    return made, shares


def _stepwise(attachment: Attachment, layer: Any, inside: list[Site], run: Call) -> Call:
    """Three and more inputs, one behind the other: every sum or product between is a value of the file."""
    merge = ops.add if name_of(layer) == "Add" else ops.multiply

    def merged(inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(inputs, (list, tuple)) or len(inputs) != len(inside) + 2:
            return run(inputs, *args, **kwargs)
        total = inputs[0]
        for site, value in zip(inside, inputs[1:-1], strict=True):
            total = attachment.at(site, merge(total, value))
        return merge(total, inputs[-1])

    return merged


def _exact(
    attachment: Attachment, made: Any, values: Sequence[Any], sites: Sequence[Site | None], sink: Site | None, arithmetic: Call
) -> Any:  # fmt: skip
    """A result as XNNPACK makes it of integers, where all grids are known and have 8 bits."""
    if attachment.training or attachment.mode != NORMAL or len(values) != len(sites):
        return made
    grids = [(site, attachment.scale(site)) for site in (*sites, sink)]
    if any(site is None or scale is None or site.root().bits != 8 for site, scale in grids):
        return made
    *scales, step = [scale for _, scale in grids]
    codes = [ops.round(ops.cast(value, "float32") / scale) for value, scale in zip(values, scales, strict=True)]
    return through(ops, ops.cast(arithmetic(codes, scales, step) * step, made.dtype), made)


def _combined(attachment: Attachment, op: Any, sites: Sequence[Site], run: Call) -> Call:
    """The sum or product of two values."""
    arithmetic = _sum if name_of(op) == "Add" else _product

    def combined(*args: Any, **kwargs: Any) -> Any:
        flat = keras.tree.flatten(args)
        return _exact(attachment, run(*args, **kwargs), flat, sites, attachment.sites.sink(op), arithmetic)

    return combined


def _sum(codes: Sequence[Any], scales: Sequence[Any], step: Any) -> Any:
    """Factors of 21 bits, and a shift that rounds half up."""
    ratios = [scale / step for scale in scales]
    shift = 20 - ops.cast(ops.floor(ops.log2(ops.maximum(*ratios))), "int32")
    power = ops.power(2.0, ops.cast(shift, "float32"))
    total = ops.left_shift(ops.ones_like(shift), shift - 1)
    for code, ratio in zip(codes, ratios, strict=True):
        total = total + ops.cast(code, "int32") * ops.cast(ops.round(ratio * power), "int32")
    return ops.cast(ops.right_shift(total, shift), "float32")


def _product(codes: Sequence[Any], scales: Sequence[Any], step: Any) -> Any:
    """One float32 factor, and half to even."""
    return ops.round(codes[0] * codes[1] * (scales[0] * scales[1] / step))


def _pooled(attachment: Attachment, site: Site | None, run: Call) -> Call:
    """Averages of integers, rounded as the kernel does: half away from zero, counted from the middle of the codes."""

    def pooled(x: Any, *args: Any, **kwargs: Any) -> Any:
        if attachment.training or attachment.mode != NORMAL or (grid := attachment.grid(site)) is None:
            return run(x, *args, **kwargs)
        scale, zero = grid
        shift = zero - 128 if site is not None and site.root().bits == 8 else 0.0
        codes = x / scale
        codes = run(through(ops, ops.round(codes), codes), *args, **kwargs) + shift
        rounded = ops.sign(codes) * ops.floor(ops.abs(codes) + 0.5)
        return (through(ops, rounded, codes) - shift) * scale

    return pooled


_GATED = {"silu": _silu, "hard_sigmoid": _hard_sigmoid}
_STEPS = {
    "SeparableConv1D": _separable, "SeparableConv2D": _separable, "Rescaling": _rescaling, "Normalization": _normalization,
}  # fmt: skip
_POOLED = ("AveragePooling1D", "AveragePooling2D")
