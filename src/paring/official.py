"""Reads the official LiteRT quantizer's recipe JSON where its meaning carries over; anything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paring.compress.quantize import Quantize
from paring.errors import InputError
from paring.recipe import Recipe, Rule

_BLOCKS = {"BLOCKWISE_32": 32, "BLOCKWISE_64": 64, "BLOCKWISE_128": 128, "BLOCKWISE_256": 256}


def recipe_from_official(data: list[Any], where: str) -> Recipe:
    """Turns the list of {regex, operation, algorithm_key, op_config} into a Recipe.

    Raises:
      InputError: An algorithm or a configuration that has no counterpart here; says which.
    """
    if not data:
        raise InputError("bad recipe", where=where, expected="a list of rules", got="an empty list")
    rules = []
    for number, entry in enumerate(data, 1):
        place = f"{where}, entry {number}"
        if not isinstance(entry, Mapping) or "algorithm_key" not in entry:
            raise InputError(f"bad {place}", expected="regex, operation, algorithm_key and op_config")
        kind = str(entry.get("operation", "*"))
        if kind in ("INPUT", "OUTPUT"):
            raise InputError(
                f"cannot carry over {kind} of {place}", todo="Use `inputs:` and `outputs:` of a paring recipe"
            )
        least = _least(entry, place)
        optional = kind != "*" or least is not None
        settings = _settings(entry, place)
        stages = () if settings is None else (settings,)
        rules.append(Rule(stages, name=_regex(entry), kind=kind, min_size=least, optional=optional))
    return Recipe(tuple(rules), name="official", source=where)


def _regex(entry: Mapping[str, Any]) -> str | None:
    pattern = str(entry.get("regex", ".*"))
    return None if pattern == ".*" else pattern


def _least(entry: Mapping[str, Any], place: str) -> int | None:
    """The number of elements below which weights stay float."""
    config: Mapping[str, Any] = entry.get("op_config") or {}
    least = config.get("min_weight_elements") or None
    if least is not None and config.get("activation_tensor_config"):
        raise InputError(
            f"cannot carry over min_weight_elements of {place}", expected="0 with static activations", got=str(least)
        )
    return least


def _settings(entry: Mapping[str, Any], place: str) -> Quantize | None:
    key = entry["algorithm_key"]
    config: Mapping[str, Any] = entry.get("op_config") or {}
    weights: Mapping[str, Any] = config.get("weight_tensor_config") or {}
    activations: Mapping[str, Any] | None = config.get("activation_tensor_config")
    if key == "no_quantize":
        return None
    if key == "float_casting":
        if weights.get("num_bits") != 16:
            raise InputError(f"cannot carry over {place}", expected="float_casting to 16 bits", got=str(weights))
        return Quantize(weights="float16", activations="float")
    if key not in ("min_max_uniform_quantize", "MSE"):
        raise InputError(
            f"cannot carry over the algorithm {key!r} of {place}",
            expected="min_max_uniform_quantize, MSE, float_casting or no_quantize",
        )
    bits, granularity = weights.get("num_bits"), weights.get("granularity", "TENSORWISE")
    if bits not in (4, 8) or weights.get("dtype", "INT") != "INT" or not weights.get("symmetric", True):
        raise InputError(
            f"cannot carry over the weights of {place}", expected="symmetric INT of 4 or 8 bits", got=str(weights)
        )
    if activations is not None and activations.get("num_bits") not in (8, 16):
        raise InputError(f"cannot carry over the activations of {place}", expected="8 or 16 bits", got=str(activations))
    if activations is not None:
        mode = f"int{activations['num_bits']}"
    else:
        mode = "float" if config.get("explicit_dequantize") or config.get("compute_precision") == "FLOAT" else "dynamic"
    if granularity not in ("TENSORWISE", "CHANNELWISE", *_BLOCKS):
        raise InputError(f"cannot carry over the granularity {granularity!r} of {place}")
    block = _BLOCKS.get(granularity, 0)
    return Quantize(
        weights=f"int{bits}",
        activations=mode,
        granularity="block" if block else "tensor" if granularity == "TENSORWISE" else "channel",
        block_size=block,
        range="mse" if key == "MSE" else "minmax",
    )
