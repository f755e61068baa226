"""Recipes: ordered rules that say what happens to which operator; the last match wins. YAML and JSON in and out."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import yaml

from paring.compress.base import Algorithm
from paring.compress.cluster import Cluster
from paring.compress.low_rank import LowRank
from paring.compress.quantize import CHOICES, Quantize
from paring.compress.sparsify import Sparsify
from paring.errors import InputError
from paring.graph import Graph, Op, OpId
from paring.named import find

VERSION = 1
IO_TYPES = ("float32", "int8", "uint8", "int16")
ALIASES = {
    "dynamic_wi8_afp32": "dynamic-int8",
    "dynamic_legacy_wi8_afp32": "dynamic-int8",
    "dynamic_wi4_afp32": "dynamic-int4",
    "weight_only_wi8_afp32": "weight-only-int8",
    "weight_only_wi4_afp32": "weight-only-int4",
    "static_wi8_ai8": "int8",
    "static_wi8_ai16": "int8-int16",
}
STAGES: Mapping[str, type[Algorithm]] = MappingProxyType(
    {"sparsify": Sparsify, "cluster": Cluster, "low_rank": LowRank, "quantize": Quantize}
)
"""The built-in stages by name; a user's own are named `module:Class`."""
_RULE_KEYS = ("name", "kind", "min_size", "max_size", "position", "apply", "optional")
_RECIPE_KEYS = ("version", "name", "description", "inputs", "outputs", "rules", "skip", "only", "equalize")


@dataclass(frozen=True)
class Rule:
    """One rule: selectors, all of which must hold, and what to apply.

    Attributes:
      stages: The algorithms, one after the other, each kind once, `Quantize` last; none for `float`.
      name: Regular expression searched in the operator's name.
      kind: Canonical kind or native operator name, several separated by `|`; `*` for all.
      min_size: Least number of elements in the operator's largest weight.
      max_size: Most.
      position: `first` or `last` operator with weights.
      optional: Whether it may match nothing.
    """

    stages: tuple[Algorithm, ...]
    name: str | None = None
    kind: str = "*"
    min_size: int | None = None
    max_size: int | None = None
    position: str | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.name is not None:
            _compile(self.name)
        if self.position not in (None, "first", "last"):
            raise InputError("bad selector", where="position", expected="first or last", got=repr(self.position))
        if not isinstance(self.stages, tuple) or not all(isinstance(stage, Algorithm) for stage in self.stages):
            got = repr(self.stages)
            raise InputError("bad stages", where=f"rule {self.describe()}", expected="a tuple of algorithms", got=got)
        kinds = [type(stage) for stage in self.stages]
        if len(set(kinds)) < len(kinds) or Quantize in kinds[:-1]:
            raise InputError(
                "bad `apply`", where=f"rule {self.describe()}", expected="each stage at most once, quantize last",
                got=", ".join(map(stage_name, self.stages)),
            )  # fmt: skip
        integers = self.apply is not None and self.apply.weights in ("int8", "int4")
        if self.prune is not None and self.prune.storage == "sparse" and integers:
            raise InputError(
                "cannot store zeros sparsely", where=f"rule {self.describe()}", expected="float32 or float16 weights",
                got=f"{self.apply.weights if self.apply else ''} weights, which stock LiteRT then reads wrongly or not at all",
                todo="Take storage dense, which compresses as well in an archive",
            )  # fmt: skip

    @property
    def apply(self) -> Quantize | None:
        """How it is quantized, None where it is not."""
        return self.stages[-1] if self.stages and isinstance(self.stages[-1], Quantize) else None

    @property
    def before(self) -> tuple[Algorithm, ...]:
        """The stages before quantization: float weights become others."""
        return self.stages[:-1] if self.apply is not None else self.stages

    @property
    def prune(self) -> Sparsify | None:
        """How its weights are pruned, None where they are not."""
        return next((stage for stage in self.stages if isinstance(stage, Sparsify)), None)

    def describe(self) -> str:
        """The selectors in one line, for messages."""
        said = [f"{k}: {getattr(self, k)}" for k in _RULE_KEYS[:5] if getattr(self, k) not in (None, "*")]
        return "{" + ", ".join(said or ["kind: '*'"]) + "}"


@dataclass(frozen=True)
class Recipe:
    """An ordered list of rules, and the types at the model's border.

    Attributes:
      rules: The last one that matches an operator wins.
      name: For reports.
      description: One line.
      inputs: Type of quantized model inputs: float32 (default), int8, uint8 or int16.
      outputs: The same for outputs.
      skip: Patterns (name or kind) of operators that stay float whatever the rules say.
      only: If not empty, operators that match none of these stay float.
      equalize: Scale channels between layers first, so that both use their grids evenly (`paring.equalize`).

    >>> Recipe.named("dynamic-int8").rules[0].stages[0].weights
    'int8'
    """

    rules: tuple[Rule, ...]
    name: str = "custom"
    description: str = ""
    inputs: str = "float32"
    outputs: str = "float32"
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    equalize: bool = False
    source: str = field(default="", compare=False)

    # -- reading -------------------------------------------------------------------------------------------------

    @staticmethod
    def names() -> list[str]:
        """The named recipes."""
        found = resources.files("paring.recipes").iterdir()
        return sorted(entry.name.removesuffix(".yaml") for entry in found if entry.name.endswith(".yaml"))

    @classmethod
    def named(cls, name: str) -> Recipe:
        """A named recipe, or the official quantizer's name for one."""
        name = ALIASES.get(name, name)
        if name not in cls.names():
            raise InputError(
                "unknown recipe", where=name, expected=", ".join(cls.names()), todo=_nearest(name, cls.names())
            )
        return cls.parse(text_of(name), name)

    @classmethod
    def load(cls, source: str | Path | Recipe | Mapping[str, Any]) -> Recipe:
        """A recipe from a name, a YAML or JSON file, a mapping, or a recipe as it is."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, Mapping):
            return cls._from_data(source, "recipe")
        path = Path(source)
        if path.suffix in (".yaml", ".yml", ".json") or path.is_file():
            try:
                return cls.parse(path.read_text(encoding="utf-8"), str(path))
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or str(error)
                raise InputError("cannot read the recipe", where=str(path), got=reason) from error
        return cls.named(str(source))

    @classmethod
    def parse(cls, text: str, where: str = "recipe") -> Recipe:
        """A recipe from YAML or JSON text; also the official quantizer's JSON list, where its meaning carries over."""
        try:
            data = json.loads(text) if text.lstrip().startswith(("[", "{")) else yaml.safe_load(text)
        except (yaml.YAMLError, json.JSONDecodeError, RecursionError) as error:
            raise InputError("cannot read the recipe", where=where, got=f"text that does not parse: {error}") from error
        if isinstance(data, list):
            from paring.official import recipe_from_official

            return recipe_from_official(data, where)
        return cls._from_data(data, where)

    @classmethod
    def _from_data(cls, data: Any, where: str) -> Recipe:
        if not isinstance(data, Mapping):
            raise InputError("bad recipe", where=where, expected="a mapping with `rules`", got=type(data).__name__)
        _known(data, _RECIPE_KEYS, where)
        if data.get("version", VERSION) != VERSION:
            raise InputError("bad recipe", where=where, expected=f"version {VERSION}", got=str(data["version"]))
        rules = data.get("rules")
        if not isinstance(rules, list) or not rules:
            raise InputError("bad recipe", where=where, expected="a list of rules", got=repr(rules))
        for key in ("inputs", "outputs"):
            if data.get(key, "float32") not in IO_TYPES:
                raise InputError(
                    "bad recipe", where=f"{where}: {key}", expected=", ".join(IO_TYPES), got=str(data[key])
                )
        if not isinstance(data.get("equalize", False), bool):
            raise InputError("bad recipe", where=f"{where}: equalize", expected="true or false")
        patterns = {key: data.get(key, []) for key in ("skip", "only")}
        for key, value in patterns.items():
            if not isinstance(value, list) or not all(isinstance(pattern, str) for pattern in value):
                raise InputError("bad recipe", where=f"{where}: {key}", expected="a list of patterns", got=repr(value))
        recipe = cls(
            rules=tuple(_rule(rule, f"{where}, rule {number}") for number, rule in enumerate(rules, 1)),
            name=str(data.get("name", Path(where).stem)),
            description=str(data.get("description", "")),
            inputs=data.get("inputs", "float32"),
            outputs=data.get("outputs", "float32"),
            equalize=data.get("equalize", False),
            source=where,
        )
        return recipe.restricted(**patterns)

    # -- writing -------------------------------------------------------------------------------------------------

    def to_data(self) -> dict[str, Any]:
        """Plain data that `load` reads back."""
        rules: list[dict[str, Any]] = []
        for rule in self.rules:
            said = {k: getattr(rule, k) for k in _RULE_KEYS[:5] if getattr(rule, k) is not None}
            applied = [{stage_name(stage): stage.settings()} for stage in rule.stages]
            said["apply"] = applied if len(applied) > 1 else applied[0] if applied else "float"
            rules.append(said | ({"optional": True} if rule.optional else {}))
        own: dict[str, Any] = {"description": self.description} if self.description else {}
        own |= {k: getattr(self, k) for k in ("inputs", "outputs") if getattr(self, k) != "float32"}
        own |= {"equalize": True} if self.equalize else {}
        own |= {k: list(getattr(self, k)) for k in ("skip", "only") if getattr(self, k)}
        return {"version": VERSION, "name": self.name, **own, "rules": rules}

    def to_yaml(self) -> str:
        """The recipe as a YAML file."""
        return yaml.safe_dump(self.to_data(), sort_keys=False, width=120)

    # -- changing ------------------------------------------------------------------------------------------------

    def restricted(self, skip: Iterable[str] = (), only: Iterable[str] = ()) -> Recipe:
        """The recipe with operators exempted (`skip`) or all others exempted (`only`)."""
        for pattern in (*skip, *only):
            _compile(pattern)
        return replace(self, skip=(*self.skip, *skip), only=(*self.only, *only))

    def with_settings(self, **settings: Any) -> Recipe:
        """The recipe with settings (`range`, `bias_correction`, ...) overridden in every quantizing rule."""
        rules = [
            r if r.apply is None else replace(r, stages=(*r.before, replace(r.apply, **settings))) for r in self.rules
        ]
        return replace(self, rules=tuple(rules))

    @property
    def static(self) -> bool:
        """True where a rule wants activations quantized."""
        return any(rule.apply is not None and rule.apply.static for rule in self.rules)

    @property
    def changes(self) -> bool:
        """True where a rule has stages before quantization."""
        return any(rule.before for rule in self.rules)

    @property
    def needs_data(self) -> bool:
        """True where a rule looks at activations."""
        return any(rule.apply is not None and rule.apply.needs_data for rule in self.rules)

    # -- matching ------------------------------------------------------------------------------------------------

    def match(self, graph: Graph) -> dict[OpId, tuple[Quantize | None, str]]:
        """How each operator is quantized, with the reason.

        Raises:
          InputError: A rule, a `skip` or an `only` pattern matches no operator and is not optional.
        """
        return {op: (rule.apply if rule is not None else None, why) for op, (rule, why) in self.winners(graph).items()}

    def winners(self, graph: Graph) -> dict[OpId, tuple[Rule | None, str]]:
        """The rule that each operator follows, None for float, with the reason.

        Raises:
          InputError: A rule, a `skip` or an `only` pattern matches no operator and is not optional.
        """
        weighted = {
            op.id: max((t.weight.size for _, t in graph.weights_of(op) if t.weight), default=0) for op in graph.ops
        }
        ordered = [op.id for op in graph.ops if weighted[op.id]]
        ends = {"first": ordered[:1], "last": ordered[-1:]}
        chosen: dict[OpId, tuple[Rule | None, str]] = {}
        for number, rule in enumerate(self.rules, 1):
            hits = [op for op in graph.ops if _matches(rule, op, weighted[op.id], ends)]
            if not hits and not rule.optional and graph.ops:
                raise _no_match(
                    f"rule {number} {rule.describe()}", rule.name or "", rule.kind, graph,
                    "Say `optional: true` in the rule if that is intended",
                )  # fmt: skip
            for op in hits:
                chosen[op.id] = (rule, f"rule {number}")
        for option in ("only", "skip"):
            for pattern in getattr(self, option):
                if not any(_touches(pattern, op) for op in graph.ops):
                    raise _no_match(f"--{option} {pattern}", pattern, pattern, graph)
        for op in graph.ops:
            if any(_touches(p, op) for p in self.skip):
                chosen[op.id] = (None, "skipped by request")
            elif self.only and not any(_touches(p, op) for p in self.only):
                chosen[op.id] = (None, "not among the requested operators")
        return {op.id: chosen.get(op.id, (None, "no rule matches")) for op in graph.ops}


def text_of(name: str) -> str:
    """The file of a named recipe, as it is."""
    return resources.files("paring.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def _touches(pattern: str, op: Op) -> bool:
    return bool(re.search(pattern, op.name)) or bool({op.kind, op.native} & set(pattern.split("|")))


def _matches(rule: Rule, op: Op, size: int, ends: Mapping[str, list[tuple[int, int]]]) -> bool:
    kinds = rule.kind.split("|")
    return (
        (rule.kind == "*" or op.kind in kinds or op.native in kinds)
        and (rule.name is None or bool(re.search(rule.name, op.name)))
        and (rule.min_size is None or size >= rule.min_size)
        and (rule.max_size is None or size <= rule.max_size)
        and (rule.position is None or op.id in ends[rule.position])
    )


def _no_match(what: str, name: str, kind: str, graph: Graph, todo: str = "") -> InputError:
    kinds = sorted({op.kind for op in graph.ops})
    near = difflib.get_close_matches(kind, kinds, 2, 0.6) if kind != "*" else []
    names = dict.fromkeys(part for op in graph.ops for part in (op.name, *re.split("[/;]", op.name)) if part)
    near += difflib.get_close_matches(name, names, 2, 0.5) if name else []
    hint = f"Nearest: {', '.join(near)}" if near else f"Kinds in this model: {', '.join(kinds)}"
    return InputError(f"{what} matches no operator", todo=". ".join(filter(None, (hint, todo))))


def _compile(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError("bad pattern", where=pattern, expected="a regular expression", got=str(error)) from error


def _known(data: Mapping[str, Any], allowed: Sequence[str], where: str) -> None:
    for key in data:
        if key not in allowed:
            raise InputError(
                f"unknown key {key!r} in {where}",
                expected=f"one of {', '.join(allowed)}",
                todo=_nearest(str(key), allowed),
            )


def _nearest(word: str, known: Sequence[str]) -> str | None:
    near = difflib.get_close_matches(word, known, 1, 0.4)
    return f"Did you mean {near[0]!r}?" if near else None


def _rule(data: Any, where: str) -> Rule:
    if not isinstance(data, Mapping) or "apply" not in data:
        raise InputError(f"bad {where}", expected="selectors and `apply`", got=repr(data))
    _known(data, _RULE_KEYS, where)
    if not any(key in data for key in _RULE_KEYS[:5]):
        raise InputError(f"bad {where}", expected=f"at least one selector of {', '.join(_RULE_KEYS[:5])}")
    selectors = {key: data[key] for key in _RULE_KEYS if key in data and key != "apply"}
    for key, kind in (("name", str), ("kind", str), ("min_size", int), ("max_size", int), ("optional", bool)):
        if key in selectors and type(selectors[key]) is not kind:
            raise InputError(f"bad {where}", expected=f"{key} of type {kind.__name__}", got=repr(selectors[key]))
    return Rule(stages=_apply(data["apply"], where), **selectors)


def _apply(data: Any, where: str) -> tuple[Algorithm, ...]:
    """The stages; none for `float`."""
    if data == "float":
        return ()
    found = []
    for stage in data if isinstance(data, list) and data else [data]:
        if not isinstance(stage, Mapping) or len(stage) != 1:
            raise InputError(
                f"bad `apply` in {where}", expected="`float` or `{quantize: {...}}`, or a list of such stages",
                got=repr(stage),
            )  # fmt: skip
        ((name, settings),) = stage.items()
        kind = _algorithm(str(name), where)
        if not isinstance(settings, Mapping):
            raise InputError(f"bad `{name}` in {where}", expected="a mapping of settings", got=repr(settings))
        _known(settings, [f.name for f in fields(kind) if f.init], f"{where}: {name}")
        values = dict(settings)
        if kind is Quantize and values.get("granularity") != "block" and values.get("block_size"):
            values.setdefault("granularity", "block")
        try:
            found.append(kind(**values))
        except (TypeError, ValueError) as error:
            raise InputError(f"bad `{name}` in {where}", got=str(error)) from error
    return tuple(found)


def _algorithm(name: str, where: str) -> type[Algorithm]:
    """A stage's class, by its name in the table or as `module:Class`."""
    if name in STAGES:
        return STAGES[name]
    if ":" not in name:
        raise InputError(
            f"unknown algorithm {name!r} in {where}",
            expected=f"{', '.join(STAGES)} or a module:Class of your own",
            todo=_nearest(name, list(STAGES)),
        )
    found = find(name, "class")
    known = isinstance(found, type) and issubclass(found, Algorithm) and found is not Algorithm
    if not known or "__dataclass_fields__" not in vars(found):  # those of Algorithm are inherited
        expected = "a dataclass derived from paring.compress.base.Algorithm"
        raise InputError(f"cannot take {name!r} in {where}", expected=expected, got=repr(found))
    return cast(type[Algorithm], found)


def stage_name(stage: Algorithm) -> str:
    """How a recipe names a stage.

    >>> stage_name(Quantize())
    'quantize'
    """
    kind = type(stage)
    return next((name for name, known in STAGES.items() if known is kind), f"{kind.__module__}:{kind.__qualname__}")


__all__ = ["ALIASES", "CHOICES", "STAGES", "Recipe", "Rule", "stage_name", "text_of"]
