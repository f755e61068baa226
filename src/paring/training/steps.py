"""Operations that a file has as several, or whose integers are rounded in a way of their own, as XNNPACK's kernels do it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from paring.compress.straight import through
from paring.grids import activation_grid
from paring.training.attachment import NORMAL, Attachment
from paring.training.layouts import name_of
from paring.training.sites import Site, activation_of, affine, fixed_range

Call = Callable[..., Any]


def _around(attachment: Attachment, op: Any) -> tuple[Site | None, Site | None]:
    """The grids that an activation reads and writes."""
    sites = attachment.sites
    return sites.before.get(op) or sites.reads.get(op, (None,))[0], (sites.outputs.get(op) or (None,))[0]


def _silu(attachment: Attachment, op: Any, gate: Site, x: Any) -> Any:
    share, (read, sink) = attachment.at(gate, ops.sigmoid(x)), _around(attachment, op)
    return _exact(attachment, x * share, (x, share), (read, gate), sink, _product)


def _hard_sigmoid(attachment: Attachment, op: Any, gate: Site, x: Any) -> Any:
    return attachment.at(gate, ops.relu6(x + 3.0)) * (1 / 6)


def _hard_silu(attachment: Attachment, op: Any, x: Any) -> Any:
    read, sink = _around(attachment, op)
    return _exact(attachment, ops.hard_silu(x), (x,), (read,), sink, _hard_swish)


def _separable(attachment: Attachment, layer: Any, inside: list[Site], x: Any, *, between: Call | None = None) -> Any:
    options: dict[str, Any] = {"data_format": layer.data_format}
    strides = layer.strides if len(set(layer.strides)) > 1 else layer.strides[0]
    x = ops.depthwise_conv(
        x, layer.depthwise_kernel, strides=strides, padding=layer.padding, dilation_rate=layer.dilation_rate, **options
    )
    x = attachment.at(inside[0], x) if between is None else between(x)
    x = ops.conv(x, layer.pointwise_kernel, strides=1, padding="valid", **options)
    if layer.use_bias:
        first = layer.data_format == "channels_first"
        x = x + ops.reshape(layer.bias, (-1, *[1] * layer.rank)) if first else x + ops.convert_to_tensor(layer.bias)
    return layer.activation(x) if layer.activation is not None else x


def _affine(attachment: Attachment, layer: Any, inside: list[Site], x: Any) -> Any:
    """A rescaling or a normalization by known numbers: one kernel for the factor and one for the shift."""
    sites = attachment.sites
    read, sink = sites.reads.get(layer, (None,))[0], sites.sink(layer)
    x, between = ops.cast(x, layer.compute_dtype), [*inside, sink]
    for (name, values), made in zip(affine(layer), between, strict=True):
        plain = getattr(ops, name)(x, ops.cast(values, x.dtype))
        exact = _exact(attachment, plain, (x, values), (read,), made, _ARITHMETIC[name])
        x, read = exact if made is sink else attachment.at(made, exact), made
    return x


def attention(
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
    shares = attachment.at(Site("softmax", bits, fixed_range("softmax", bits)), shares)
    dropout = getattr(layer, "_dropout_layer", None)
    dropped = dropout(shares, training=training) if dropout is not None else shares
    made = attachment.at(inside[2], ops.einsum("bnts,bsnh->btnh", dropped, value))
    return made, shares


def stepwise(attachment: Attachment, layer: Any, inside: list[Site], run: Call) -> Call:
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
    """A result as XNNPACK makes it of integers, where all grids are known and have 8 bits; constants have one each."""
    if attachment.training or attachment.mode != NORMAL:
        return made
    known, read = iter(sites), []
    for value in values:
        if isinstance(value, (int, float, np.ndarray)):
            read.append(_constant(np.asarray(value, np.float32)))
            continue
        if isinstance(value, keras.Variable):
            read.append(_table(value))
            continue
        site = next(known, None)
        scale = attachment.scale(site)
        if site is None or scale is None or site.root().bits != 8:
            return made
        read.append((ops.round(ops.cast(value, "float32") / scale), scale))
    step = attachment.scale(sink)
    if step is None or sink is None or sink.root().bits != 8:
        return made
    codes, scales = zip(*read, strict=True)
    return through(ops, ops.cast(arithmetic(codes, scales, step) * step, made.dtype), made)


def _constant(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Codes from the zero point, and their step, as the writer stores numbers that meet an activation."""
    grid = activation_grid(float(values.min()), float(values.max()), "int8")
    scale, zero = np.float32(grid.scale[0]), int(grid.zero_point[0])
    return np.asarray(np.clip(np.rint(values / scale) + zero, -128, 127) - zero, np.float32), scale


def _table(variable: Any) -> tuple[Any, Any]:
    """The same of a weight as it is now, which a layer of a user's own adds or multiplies."""
    values = ops.cast(ops.convert_to_tensor(variable), "float32")
    low, high = ops.minimum(ops.min(values), 0.0), ops.maximum(ops.max(values), 0.0)
    scale = ops.maximum(high - low, 1e-6) / 255
    zero = ops.round(-128 - low / scale)
    return ops.clip(ops.round(values / scale) + zero, -128, 127) - zero, scale


def combined(attachment: Attachment, op: Any, sites: Sequence[Site], run: Call) -> Call:
    """The sum or product of two values, or of one and a number."""
    arithmetic = _ARITHMETIC[name_of(op).lower()]

    def made(*args: Any, **kwargs: Any) -> Any:
        flat = keras.tree.flatten(args)
        return _exact(attachment, run(*args, **kwargs), flat, sites, attachment.sites.sink(op), arithmetic)

    return made


def _sum(codes: Sequence[Any], scales: Sequence[Any], step: Any) -> Any:
    """Factors of 21 bits, and a shift that rounds half up."""
    ratios = [scale / step for scale in scales]
    shift = 20 - ops.cast(ops.floor(ops.log2(ops.maximum(*ratios))), "int32")
    power = ops.power(2.0, ops.cast(shift, "float32"))
    total = ops.left_shift(ops.ones_like(shift), shift - 1)
    for code, ratio in zip(codes, ratios, strict=True):
        total = total + ops.cast(code, "int32") * ops.cast(ops.round(ratio * power), "int32")
    return ops.cast(ops.right_shift(total, shift), "float32")


def _difference(codes: Sequence[Any], scales: Sequence[Any], step: Any) -> Any:
    return _sum((codes[0], -codes[1]), scales, step)


def _product(codes: Sequence[Any], scales: Sequence[Any], step: Any) -> Any:
    """One float32 factor, and half to even."""
    return ops.round(codes[0] * codes[1] * (scales[0] * scales[1] / step))


_ARITHMETIC = {"add": _sum, "subtract": _difference, "multiply": _product}


def _hard_swish(codes: Sequence[Any], scales: Sequence[Any], step: Any) -> Any:
    """As LiteRT's own kernel does it, which XNNPACK leaves it to: 16 bits with factors of 15, each product rounded."""
    value = ops.left_shift(ops.cast(codes[0], "int32"), 7)
    slope, down = _fixed_point(scales[0] / 128 / step)
    gain, up = _fixed_point(scales[0] / 128 / (3 / 32768))
    gate = _narrow(ops.left_shift(value, ops.clip(up - 1, 0, 15)))
    gate = _narrow(ops.left_shift(_high_product(gate, gain), ops.clip(up, 0, 1)))
    gate = ops.right_shift(_shifted(gate, ops.maximum(-up, 0)) + 32768, 1)
    found = _narrow(_truncated(gate * _high_product(value, slope)))
    return ops.cast(_shifted(found, ops.maximum(-down, 0)), "float32")


def _fixed_point(factor: Any) -> tuple[Any, Any]:
    """A float32 scalar as a whole number below 2^15, and the power of two times 2^-15 that it is to be multiplied with."""
    power = ops.floor(ops.log2(factor)) + 1
    power = (
        power
        + ops.cast(factor >= ops.power(2.0, power), "float32")
        - ops.cast(factor < ops.power(2.0, power - 1), "float32")
    )
    whole = ops.minimum(ops.floor(factor * ops.power(2.0, 15 - power) + 0.5), 32767.0)
    return ops.cast(whole, "int32"), ops.cast(power, "int32")


def _narrow(x: Any) -> Any:
    return ops.clip(x, -32768, 32767)


def _truncated(product: Any) -> Any:
    """int32 over 2^15, towards zero."""
    return ops.sign(product) * ops.right_shift(ops.abs(product), 15)


def _high_product(a: Any, b: Any) -> Any:
    """The product over 2^15, half up."""
    product = a * b
    return _narrow(_truncated(product + ops.where(product >= 0, 16384, -16383)))


def _shifted(x: Any, places: Any) -> Any:
    """int32 over 2^places, half away from zero."""
    mask = ops.left_shift(ops.ones_like(places), places) - 1
    beyond = ops.bitwise_and(x, mask) > ops.right_shift(mask, 1) + ops.cast(x < 0, "int32")
    return ops.right_shift(x, places) + ops.cast(beyond, "int32")


def pooled(attachment: Attachment, site: Site | None, run: Call) -> Call:
    """Averages of integers, rounded as the kernel does: half away from zero, counted from the middle of the codes."""

    def averaged(x: Any, *args: Any, **kwargs: Any) -> Any:
        if attachment.training or attachment.mode != NORMAL or (grid := attachment.grid(site)) is None:
            return run(x, *args, **kwargs)
        scale, zero = grid
        shift = zero - 128 if site is not None and site.root().bits == 8 else 0.0
        codes = x / scale
        codes = run(through(ops, ops.round(codes), codes), *args, **kwargs) + shift
        rounded = ops.sign(codes) * ops.floor(ops.abs(codes) + 0.5)
        return (through(ops, rounded, codes) - shift) * scale

    return averaged


_GATED = {"silu": _silu, "hard_sigmoid": _hard_sigmoid}


def activated(attachment: Attachment, op: Any, inside: list[Site]) -> Call | None:
    """What runs for the activation of an operation, None where its own function does."""
    name = activation_of(op)
    if name == "hard_silu":
        return functools.partial(_hard_silu, attachment, op)
    return functools.partial(_GATED[name], attachment, op, inside[-1]) if name in _GATED and inside else None


STEPS = {
    "SeparableConv1D": _separable, "SeparableConv2D": _separable, "Rescaling": _affine, "Normalization": _affine,
}  # fmt: skip
POOLED = ("AveragePooling1D", "AveragePooling2D")
