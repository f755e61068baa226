"""Recipes in and out: what is written reads back, what is wrong is said with the nearest right word."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
from graphs import Sketch

from paring.compress.quantize import Quantize
from paring.errors import InputError
from paring.recipe import ALIASES, Recipe, Rule

STATIC = {"apply": {"quantize": {"weights": "int8", "activations": "int8"}}}


def rules(*given: dict) -> dict:
    return {"rules": list(given)}


def refused(data) -> str:
    """The one-line message of what is refused with exit code 2."""
    with pytest.raises(InputError) as error:
        Recipe.parse(data) if isinstance(data, str) else Recipe.load(data)
    message = str(error.value)
    assert error.value.exit_code == 2
    assert "\n" not in message
    assert message.endswith((".", "?", "!"))
    return message


@pytest.fixture
def graph():
    net = Sketch()
    y = net.conv("trunk/conv", net.tensor("x"))
    return net.finish([], [net.dense("head", net.dense("body", y))])


# -- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", Recipe.names())
def test_named_recipes_read_back_from_yaml_and_json(name):
    recipe = Recipe.named(name)
    assert recipe.name == name
    assert recipe.description
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert Recipe.parse(json.dumps(recipe.to_data())) == recipe
    assert Recipe.load(recipe.to_data()) == recipe


def test_every_field_reads_back():
    settings = Quantize("int4", "dynamic", "block", 64, "mse", 99.5, bias_correction=True)
    recipe = Recipe(
        (
            Rule((settings,), name="a/.*", kind="dense|conv2d", min_size=10, max_size=20, position="first", optional=True),
            Rule((), name="head"),
            Rule((Quantize(activations="int16", granularity="tensor", range="percentile", percentile=99.0),)),
        ),
        "mine", "what it does", "int8", "uint8", ("softmax", "a|b"), ("trunk/", "dense"),
    )  # fmt: skip
    assert Recipe.parse(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    "more",
    [
        {"skip": ["dense"]},
        {"skip": ["^h", "conv2d"]},
        {"only": ["dense"]},
        {"only": ["head|CONV_2D"]},
        {"only": ["trunk", "body"], "skip": ["body"]},
    ],
)
def test_skip_and_only_read_back_to_the_same_decisions(graph, more):
    recipe = Recipe.named("dynamic-int8").restricted(**more)
    again = Recipe.load(recipe.to_data())
    assert again.match(graph) == recipe.match(graph)
    assert recipe.match(graph) != Recipe.named("dynamic-int8").match(graph)


def test_restricted_adds_to_what_was_said_before():
    recipe = Recipe.named("int8").restricted(skip=["a"]).restricted(skip=["b"], only=["c"])
    assert (recipe.skip, recipe.only) == (("a", "b"), ("c",))
    assert Recipe.named("int8").skip == ()


def test_with_settings_overrides_every_quantizing_rule():
    recipe = Recipe((Rule((Quantize(),)), Rule((), name="head"))).with_settings(range="mse", bias_correction=True)
    assert recipe.rules == (Rule((Quantize(range="mse", bias_correction=True),)), Rule((), name="head"))


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".txt"])
def test_a_recipe_is_read_from_a_file_of_either_kind(tmp_path, suffix):
    recipe = Recipe.named("int4-int8")
    path = tmp_path / f"mine{suffix}"
    path.write_text(json.dumps(recipe.to_data()) if suffix == ".json" else recipe.to_yaml(), encoding="utf-8")
    assert Recipe.load(path) == Recipe.load(str(path)) == recipe


def test_a_recipe_without_a_name_takes_its_files(tmp_path):
    (tmp_path / "mine.yaml").write_text("rules: [{kind: dense, apply: float}]", encoding="utf-8")
    assert Recipe.load(tmp_path / "mine.yaml").name == "mine"


@pytest.mark.parametrize(("old", "new"), ALIASES.items())
def test_the_official_quantizers_names_work(old, new):
    assert Recipe.load(old) == Recipe.named(new)


def test_a_block_size_alone_means_blocks():
    data = rules({"kind": "dense", "apply": {"quantize": {"weights": "int4", "block_size": 32}}})
    assert Recipe.load(data).rules[0].apply.granularity == "block"


@pytest.mark.parametrize(
    ("name", "static", "needs_data"),
    [("dynamic-int8", False, False), ("dynamic-int4", False, True), ("int8", True, True), ("float16", False, False)],
)
def test_what_a_recipe_asks_of_data(name, static, needs_data):
    recipe = Recipe.named(name)
    assert (recipe.static, recipe.needs_data) == (static, needs_data)


# -- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"rule": [], "rules": []}, "Did you mean 'rules'?"),
        ({"input": "int8", **rules(STATIC)}, "Did you mean 'inputs'?"),
        (rules({"knd": "dense", **STATIC}), "Did you mean 'kind'?"),
        (rules({"minsize": 3, "kind": "*", **STATIC}), "Did you mean 'min_size'?"),
        (rules({"kind": "*", "apply": {"quantise": {}}}), "Did you mean 'quantize'?"),
        (rules({"kind": "*", "apply": {"quantize": {"weight": "int8"}}}), "Did you mean 'weights'?"),
        (rules({"kind": "*", "apply": {"quantize": {"bias_corection": True}}}), "Did you mean 'bias_correction'?"),
    ],
)
def test_an_unknown_key_names_the_nearest_at_every_level(data, word):
    assert refused(data).endswith(word)


def test_an_unknown_name_names_the_nearest_and_all():
    message = refused_name("int9")
    assert "int8" in message.split("Did you mean")[1]
    assert all(name in message for name in Recipe.names())


def refused_name(name: str) -> str:
    with pytest.raises(InputError) as error:
        Recipe.load(name)
    return str(error.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"version": 2, **rules(STATIC)}, ["expected version 1", "got 2"]),
        ({"version": "1", **rules(STATIC)}, ["expected version 1"]),
        ({}, ["a list of rules"]),
        ({"rules": []}, ["a list of rules"]),
        ({"rules": {"kind": "*"}}, ["a list of rules"]),
        (rules("float"), ["rule 1", "selectors and `apply`"]),
        (rules({"kind": "*"}), ["rule 1", "selectors and `apply`"]),
        (rules(STATIC), ["rule 1", "at least one selector"]),
        (rules({"kind": 3, **STATIC}), ["kind of type str", "got 3"]),
        (rules({"name": None, **STATIC}), ["name of type str"]),
        (rules({"min_size": "10", **STATIC}), ["min_size of type int"]),
        (rules({"min_size": True, **STATIC}), ["min_size of type int"]),
        (rules({"kind": "*", "optional": "no", **STATIC}), ["optional of type bool"]),
        (rules({"name": "(", **STATIC}), ["bad pattern for (", "regular expression"]),
        (rules({"position": "middle", **STATIC}), ["first or last", "middle"]),
        (rules({"kind": "*", "apply": "int8"}), ["`float` or `{quantize: {...}}`"]),
        (rules({"kind": "*", "apply": {"quantize": {}, "float": {}}}), ["`float` or"]),
        (rules({"kind": "*", "apply": {"quantize": "int8"}}), ["a mapping of settings"]),
        (rules({"kind": "*", "apply": {"quantize": {"weights": "int3"}}}), ["quantize.weights", "int8, int4", "int3"]),
        (rules({"kind": "*", "apply": {"quantize": {"activations": "int4"}}}), ["quantize.activations"]),
        (rules({"kind": "*", "apply": {"quantize": {"rounding": "floor"}}}), ["quantize.rounding", "nearest, gptq, adaround"]),
        (rules({"kind": "*", "apply": {"quantize": {"percentile": 40}}}), ["50 to 100", "40"]),
        (rules({"kind": "*", "apply": {"quantize": {"percentile": "99"}}}), ["50 to 100"]),
        (rules({"kind": "*", "apply": {"quantize": {"bias_correction": "no"}}}), ["true or false"]),
        (rules({"kind": "*", "apply": {"quantize": {"block_size": 48, "weights": "int4"}}}), ["block_size", "48"]),
        (rules({"kind": "*", "apply": {"quantize": {"granularity": "block", "weights": "int4"}}}), ["block_size"]),
        (rules({"kind": "*", "apply": {"quantize": {"block_size": 32}}}), ["int4 weights with block scales"]),
        ({"inputs": "int4", **rules({"kind": "*", **STATIC})}, ["inputs", "float32, int8, uint8, int16"]),
        ({"skip": "dense", **rules({"kind": "*", **STATIC})}, ["skip", "a list of patterns"]),
        ({"only": ["("], **rules({"kind": "*", **STATIC})}, ["bad pattern for ("]),
        ("just text", ["a mapping with `rules`"]),
        ("", ["a mapping with `rules`"]),
        ("rules: [", ["does not parse"]),
        ('{"rules": ', ["does not parse"]),
        ("[" * 100_000, ["does not parse"]),
        ("[]", ["a list of rules"]),
        ("rules: !!python/object/apply:os.getcwd []", ["does not parse"]),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(data, words):
    message = refused(data)
    assert all(word in message for word in words), message


def test_a_missing_or_binary_file_is_said(tmp_path):
    assert "No such file" in refused_name(str(tmp_path / "absent.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the recipe" in refused_name(str(tmp_path / "binary.yaml"))


# -- the official quantizer's JSON -----------------------------------------------------------------------------------


@pytest.fixture
def official(litert_quantizer: ModuleType):
    """Makes one entry of an official recipe with the official library."""
    from litert_quantizer import algorithm_manager, qtyping, recipe_manager

    def make(algorithm: str = "MIN_MAX_UNIFORM_QUANT", operation: str = "*", regex: str = ".*", **config) -> list:
        manager = recipe_manager.RecipeManager()
        key = getattr(algorithm_manager.AlgorithmName, algorithm)
        weights = qtyping.TensorQuantizationConfig(
            **{"num_bits": 8, "granularity": qtyping.QuantGranularity.CHANNELWISE, **config}
        )
        settings = qtyping.OpQuantizationConfig(
            weight_tensor_config=weights, compute_precision="INTEGER", skip_checks=True
        )
        manager.add_quantization_config(regex, qtyping.TFLOperationName(operation), settings, key)
        return manager.get_quantization_recipe()

    return make


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("dynamic_wi8_afp32", Quantize()),
        ("dynamic_wi4_afp32", Quantize(weights="int4")),
        ("dynamic_wi4b32_afp32", Quantize(weights="int4", granularity="block", block_size=32)),
        ("weight_only_wi8_afp32", Quantize(activations="float")),
        ("weight_only_wi4_afp32", Quantize(weights="int4", activations="float")),
        ("static_wi8_ai8", Quantize(activations="int8")),
        ("static_wi8_ai16", Quantize(activations="int16")),
    ],
)
def test_the_official_recipes_carry_over(litert_quantizer, name, wanted):
    from litert_quantizer import recipe

    [rule] = Recipe.parse(json.dumps(getattr(recipe, name)())).rules
    assert rule == Rule((wanted,))


def test_the_smallest_weight_of_an_official_rule_carries_over(litert_quantizer):
    from litert_quantizer import recipe

    [rule] = Recipe.parse(json.dumps(recipe.dynamic_legacy_wi8_afp32())).rules
    assert (rule.min_size, rule.optional) == (1024, True)


def test_mse_regex_and_operation_carry_over(official):
    [rule] = Recipe.parse(json.dumps(official("MSE", "FULLY_CONNECTED", "head/.*"))).rules
    assert rule == Rule((Quantize(range="mse"),), name="head/.*", kind="FULLY_CONNECTED", optional=True)


def test_float_casting_and_no_quantize_carry_over(official, litert_quantizer):
    from litert_quantizer import qtyping

    cast = official(
        "FLOAT_CASTING",
        num_bits=16,
        dtype=qtyping.TensorDataType.FLOAT,
        granularity=qtyping.QuantGranularity.TENSORWISE,
    )
    kept = official("NO_QUANTIZE", "SOFTMAX")
    got = Recipe.parse(json.dumps(cast + kept)).rules
    assert got == (Rule((Quantize("float16", "float"),)), Rule((), kind="SOFTMAX", optional=True))


@pytest.mark.parametrize(
    "algorithm",
    ["GPTQ", "OCTAV", "OSCAR", "HADAMARD_ROTATION", "DECOMPOSED_HADAMARD_ROTATION", "DEQUANTIZED_WEIGHT_RECOVERY"],
)
def test_an_algorithm_without_a_counterpart_is_refused_by_name(official, litert_quantizer, algorithm):
    from litert_quantizer.algorithm_manager import AlgorithmName

    key = AlgorithmName[algorithm].value
    message = refused(json.dumps([*official(), {**official()[0], "algorithm_key": key}]))
    assert key in message
    assert "entry 2" in message


@pytest.mark.parametrize("port", ["INPUT", "OUTPUT"])
def test_official_inputs_and_outputs_are_refused_with_the_remedy(official, port):
    message = refused(json.dumps(official(operation=port)))
    assert port in message
    assert "`inputs:` and `outputs:`" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_bits": 2}, "4 or 8 bits"),
        ({"symmetric": False}, "symmetric INT"),
        ({"granularity": "BLOCKWISE_16"}, "BLOCKWISE_16"),
        ({"granularity": "BLOCKWISE_32"}, "int4 weights with block scales"),
    ],
)
def test_official_weights_without_a_counterpart_are_refused(official, change, words):
    [entry] = official()
    entry["op_config"]["weight_tensor_config"].update(change)
    assert words in refused(json.dumps([entry]))


def test_a_smallest_weight_beside_static_activations_is_refused(litert_quantizer):
    from litert_quantizer import recipe

    [entry] = recipe.static_wi8_ai8()
    entry["op_config"]["min_weight_elements"] = 1024
    assert "min_weight_elements" in refused(json.dumps([entry]))


def test_an_entry_that_is_none_is_refused():
    assert "entry 1" in refused("[3]")
    assert "entry 1" in refused('[{"regex": ".*"}]')
    assert "bad pattern" in refused('[{"regex": "(", "algorithm_key": "no_quantize"}]')
