"""Load, plan, solve, apply, save, verify: the whole way of a model, top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from paring.calibrate import calibrate
from paring.calibration import HISTOGRAM, Statistics
from paring.data import Feed, feeds
from paring.decision import CONVERSIONS, DYNAMIC, FLOAT, KEPT, STATIC, WEIGHT_ONLY, Decision, Plan
from paring.diagnose import diagnose, fitted, unreachable
from paring.equalize import equalize
from paring.errors import BoundError, InputError, UnsupportedError
from paring.folders.native import check_runtime
from paring.folders.optimize import optimize_folder
from paring.formats import check_there, load
from paring.formats.saved_model.model import SavedModel, writes_folder
from paring.formats.tflite.apply import apply, set_constants, versions_of
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.sink import sink
from paring.formats.tflite.sparse import store_sparse
from paring.formats.tflite.versions import oldest_runtime
from paring.formats.tflite.view import view
from paring.graph import Graph, TensorId
from paring.loops import witnessed
from paring.outcome import VERSION, Clock, Culprit, Report, Row
from paring.plan import activation_input, check, ground, refine
from paring.recipe import Recipe
from paring.replay import Replay
from paring.solve import Solution, requests, solve
from paring.stages import Stages, run
from paring.verify import PATH_NAMES, PATHS, Verification, alike, verify

SAME = 1e-5  # relative: the same numbers, summed in another order


@dataclass(frozen=True)
class Result:
    """The optimized model with its report."""

    model: TfliteModel | SavedModel = field(repr=False)
    report: Report
    plan: Plan = field(repr=False)
    statistics: Statistics | None = field(repr=False, default=None)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model, atomically."""
        self.model.save(path)


def optimize(
    source: Any,
    recipe: str | os.PathLike[str] | Recipe | dict[str, Any] = "dynamic-int8",
    data: Any = None,
    *,
    output: str | os.PathLike[str] | None = None,
    statistics: Statistics | str | os.PathLike[str] | None = None,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    densify: bool = False,
    strict: bool = False,
    verified: bool = True,
    max_error: float | None = None,
    overwrite: bool = False,
    limit: int | None = None,
    image_range: Any = None,
    kernels: str = "xnnpack",
    runtime: str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Applies a recipe to a model.

    It does not train: see `paring.attach` for that. Nothing is written before everything is solved and verified.

    Args:
      source: A `.tflite`, `.keras` or `.h5` path, a SavedModel folder, bytes of a .tflite file, or a live Keras model.
      recipe: A recipe's name, file or object.
      data: Samples (see `paring.samples.open_samples`): needed by recipes with static activations, improves others.
      output: Where to write the model; None to keep it in memory. A SavedModel becomes another one where this names no
        `.tflite` file, see `paring.folders.optimize`.
      statistics: Statistics of an earlier calibration instead of `data`.
      skip: Patterns (name or kind) of operators to leave float.
      only: Patterns of the only operators to touch.
      densify: Quantize sparse weights too, densely.
      strict: Refuse to leave a float operator.
      verified: Run the result, operator by operator.
      max_error: Bound on the relative difference of every output.
      overwrite: Whether `output` may exist already.
      limit: At most so many samples.
      image_range: For a folder of images and a float input: the values of pixels 0 and 255.
      kernels: Kernels to calibrate on: `xnnpack`, or `builtin` for those that TensorFlow's converter calibrates on.
      runtime: What runs a SavedModel that is written: `portable` (the default), stock operators; `native`, paring's own where
        they can, for which `paring.tensorflow` is imported before the model is loaded.
      progress: Called with the number of layers done in each stage before quantization; then, from 1 again, with that of
        samples calibrated on and, again, of layers rounded by data.

    Raises:
      InputError: Bad model, recipe, data or output path; exit code 2.
      BoundError: The result is not-a-number, no runtime path computes it rightly, or a bound was missed; exit code 1.

    >>> from paring.demo import model_path
    >>> result = optimize(model_path(), "dynamic-int8", verified=False)
    >>> result.report.ratio < 0.4
    True
    """
    clock = Clock()
    chosen = Recipe.load(recipe if isinstance(recipe, (str, Recipe, dict)) else str(recipe)).restricted(skip, only)
    check_there(source)
    if max_error is not None and not verified:
        raise InputError("cannot hold the bound", where="--max-error", expected="a run to compare", got="--no-verify")
    if writes_folder(source, output):
        assert output is not None
        written = optimize_folder(
            source, chosen, data, output, statistics=statistics, strict=strict, verified=verified, max_error=max_error,
            overwrite=overwrite, limit=limit, image_range=image_range, runtime=runtime or "portable", progress=progress,
        )  # fmt: skip
        return Result(written.model, written.report, written.plan)
    check_runtime(runtime)
    if not chosen.static and {chosen.inputs, chosen.outputs} != {"float32"}:
        raise InputError(
            "inputs and outputs cannot be integers", where=f"recipe {chosen.name}", expected="static activations",
            todo="Take a recipe such as int8",
        )  # fmt: skip
    check(chosen)
    target = check_target(output, overwrite)
    model = sink(load(source))
    original, evened = model, tuple[str, ...]()
    densify = densify or chosen.changes  # what is sparse already may become sparser
    graph = view(model, densify=densify, fold_ranges=chosen.static)
    clock.mark("load")
    if chosen.equalize:
        model, evened = _equalized(model, graph)
        graph = view(model, densify=densify, fold_ranges=chosen.static)
        clock.mark("equalize")
    asked = data is not None or image_range is not None
    given = feeds(model, data, image_range=image_range, limit=limit) if asked else None
    staged, stored = run(model, graph, chosen, given, progress), tuple[str, ...]()
    if staged.model is not model:
        model = staged.model
        graph = view(model, densify=densify, fold_ranges=chosen.static)
        clock.mark("compress")
    made = staged.planned(graph, chosen)
    clock.mark("plan")
    found = _statistics(model, graph, made, given, statistics, chosen, kernels, progress)
    clock.mark("calibrate")
    if found is not None:
        made = witnessed(refine(made, found), found)
    _check_strict(made, strict)
    made, solution = _reachable(made, strict, lambda made: solve(made, found))
    if made.asking:  # again, on the grids as they are now
        made, solution = _reachable(made, strict, lambda made: _on_data(model, graph, made, found, given, progress))
    clock.mark("encode")
    changed = apply(model, graph, solution.edits, solution.borders, _record(chosen, model), _floors(made))
    if staged.sparse:
        changed, stored = _stored_sparsely(changed, graph, staged, _floors(made), given or feeds(model, None), verified)
        clock.mark("store")
    verification = None
    part = target.with_name(f".{target.name}.{os.getpid()}.part") if target is not None else None
    try:
        if part is not None:
            changed.save(part)
            clock.mark("save")
            changed = TfliteModel.open(part)
        if verified:
            verification = verify(original, changed, given or feeds(model, None), written_path=part)
            _check_input(original, verification)
            _judge(verification, max_error)
            clock.mark("verify")
        size = part.stat().st_size if part is not None else len(changed.to_bytes())
        if part is not None and target is not None:
            os.replace(part, target)
            changed.path = str(target)
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    report = Report(
        source=model.path,
        output=str(target or "<memory>"),
        recipe=chosen.name,
        source_bytes=len(original.data),
        output_bytes=size,
        rows=_rows(made, solution.notes, staged),
        culprits=tuple(Culprit(*c) for c in diagnose(made, found)) if found is not None else (),
        verification=verification,
        runtime=oldest_runtime(versions_of(changed.root, changed), _floors(made)),
        samples=found.samples if found is not None else 0,
        seconds=clock.seconds,
        notes=(
            *evened,
            *staged.notes,
            *staged.broken(made, solution),
            *stored,
            *_notes(model, made, found, given, data),
            *_still_float(graph, chosen, solution),
            *((*verification.notes, *fitted(made)) if verification is not None else ()),
        ),
    )
    return Result(changed, report, made, found)


def check_target(output: str | os.PathLike[str] | None, overwrite: bool) -> Path | None:
    """The output as a path.

    Raises:
      InputError: It cannot be written, or exists and may not be replaced.
    """
    if output is None:
        return None
    path = Path(output)
    if path.suffix == ".keras":
        raise UnsupportedError(
            "cannot write a quantized model", where=str(path), expected="a .tflite output",
            got=".keras, which has no place for integer weights", todo="Name the output .tflite",
        )  # fmt: skip
    if path.suffix != ".tflite":
        raise UnsupportedError(
            f"cannot write {path}", expected="an output that ends in .tflite", got=path.suffix or "no suffix"
        )
    if path.is_dir():
        raise InputError("cannot write the model", where=str(path), got="a folder")
    if path.exists() and not overwrite:
        raise InputError("the output exists", where=str(path), todo="Say --overwrite to replace it")
    if not path.parent.is_dir():
        raise InputError("cannot write the model", where=str(path), got=f"no folder {path.parent}")
    return path


def _statistics(
    model: TfliteModel,
    graph: Graph,
    made: Plan,
    given: list[Feed] | None,
    saved: Statistics | str | os.PathLike[str] | None,
    recipe: Recipe,
    kernels: str,
    progress: Callable[[int], None] | None,
) -> Statistics | None:
    wanted = requests(made)
    needed = [t for t, parts in wanted.items() if "range" in parts]
    if saved is not None:
        found = saved if isinstance(saved, Statistics) else Statistics.load(os.fspath(saved))
        for tensor, name in found.names.items():
            if tensor not in graph.tensors or graph.tensors[tensor].name != name:
                raise InputError("the statistics are of another model", where=f"tensor {name}")
        for tensor, parts in wanted.items():
            if HISTOGRAM in parts and tensor in found.tensors and found.tensors[tensor].histogram is None:
                raise InputError(
                    "the statistics keep too little", where=f"tensor {graph.tensors[tensor].name}",
                    expected="a histogram", got="minimum and maximum", todo="Calibrate with this recipe (--data)",
                )  # fmt: skip
        return found
    if given is None:
        if made.counts()[STATIC] and needed:
            raise InputError(
                f"recipe {recipe.name} needs calibration data",
                todo="Give samples with --data (.npz, .npy, a folder of images or module:function), or take dynamic-int8",
            )
        return None
    if not wanted:
        return None
    return calibrate(model, graph, wanted, given, kernels=kernels, progress=progress)


def _equalized(model: TfliteModel, graph: Graph) -> tuple[TfliteModel, tuple[str, ...]]:
    """The model with its layers equalized, and what to say of it."""
    found = equalize(graph)
    left = ", ".join(f"{count} because {why}" for why, count in found.left.items())
    said = f"{len(found.pairs)} pairs of layers were equalized" + (f"; of other layers {left}" if left else "")
    return (set_constants(model, found.constants) if found.pairs else model), (said,)


def _reachable(made: Plan, strict: bool, numbers: Callable[[Plan], Solution]) -> tuple[Plan, Solution]:
    """The solution, and the plan without the operators whose solved grids no kernel can serve."""
    solution = numbers(made)
    while beyond := unreachable(made, solution):
        made = ground(made, beyond)
        _check_strict(made, strict)
        solution = numbers(made)
    return made, solution


def _on_data(
    model: TfliteModel,
    graph: Graph,
    made: Plan,
    found: Statistics | None,
    given: list[Feed] | None,
    progress: Callable[[int], None] | None,
) -> Solution:
    """Solves again, each operator behind those before it as they are now."""
    if given is None:
        rounding = next(d.settings.rounding for d in made.decisions if d.settings is not None and d.settings.sequential)
        raise InputError(f"rounding {rounding} needs data", todo="Give samples with --data, or take --rounding nearest")
    with Replay(model, graph, made.asking, given, progress=progress) as replay:
        return solve(made, found, replay)


def _stored_sparsely(
    dense: TfliteModel, graph: Graph, staged: Stages, floors: list[str], given: list[Feed], verified: bool
) -> tuple[TfliteModel, tuple[str, ...]]:
    """The model with pruned weights stored without their zeros, and what to say of it.

    Raises:
      BoundError: A runtime path does not give the dense model's outputs.
    """
    weights = []
    for op in (op for op in graph.ops if op.id in staged.sparse):
        number, result = op.outputs[0][0], dense.places[op.outputs[0][0]][op.outputs[0][1]]
        operator = next(o for o in dense.subgraphs[number].operators if result in o.outputs)
        weights += [(number, int(operator.inputs[use.input])) for use, _ in graph.weights_of(op)]
    changed, count = store_sparse(dense, weights, floors)
    for path, difference in alike(dense, changed, given).items() if verified and count else ():
        if isinstance(difference, str) or not difference <= SAME:
            raise BoundError(
                "sparse weights are not read rightly", where=PATH_NAMES[path], expected="the outputs of the dense file",
                got=difference if isinstance(difference, str) else f"a relative difference of {difference:.3g}",
                todo="Nothing was written; take storage dense",
            )  # fmt: skip
    rest = len(staged.sparse) - count
    return changed, (f"{rest} layers have too few zeros to be smaller without them: stored dense",) if rest else ()


def _record(recipe: Recipe, model: TfliteModel) -> dict[str, Any]:
    return {"paring": VERSION, "recipe": recipe.to_data()}


def _check_strict(made: Plan, strict: bool) -> None:
    left = [d for d in made.decisions if d.mode in (FLOAT, WEIGHT_ONLY, DYNAMIC) and not _no_reals(made, d.op.inputs)]
    if strict and left:
        shown = "; ".join(f"{d.op.name} ({d.reason})" for d in left[:5])
        more = f" and {len(left) - 5} more" if len(left) > 5 else ""
        raise BoundError("operators would stay float", expected="none (--strict)", got=f"{shown}{more}")


def _no_reals(made: Plan, inputs: Sequence[TensorId | None]) -> bool:
    return not any(t is not None and made.graph.tensors[t].dtype == "float32" for t in inputs)


def _check_input(model: TfliteModel, verification: Verification) -> None:
    """A source that no path runs is a broken one, unless it asks for an operator that this runtime does not bring.

    Made-up samples prove nothing about inputs of any size: a right model may well refuse an image of one pixel.
    """
    tensors = [model.subgraphs[0].tensors[int(i)] for i in model.subgraphs[0].inputs]
    if not verification.given and any(
        t.shape_signature is not None and (t.shape_signature[1:] < 0).any() for t in tensors
    ):
        return
    natives = {model.native(op) for subgraph in model.subgraphs for op in subgraph.operators}
    if all(path in verification.refused for path in PATHS) and not any(n.startswith("CUSTOM:") for n in natives):
        raise InputError(
            "the runtime does not run the input", where=model.path,
            got="; ".join(f"{path}: {why.rstrip('.')}" for path, why in verification.refused.items()),
            todo="Is the file complete?" + ("" if verification.given else " If it needs certain inputs, give some (--data)"),
        )  # fmt: skip


def _judge(verification: Verification, max_error: float | None) -> None:
    if verification.nan:
        raise BoundError("the result is not-a-number", where=", ".join(verification.nan), todo="Nothing was written")
    if verification.unusable:
        said = [f"{p}: {why}" for p, why in verification.failed.items()]
        said += [
            f"{p}: {', '.join(f.name for f in wrong[:5])}"
            for p in verification.findings
            if (wrong := verification.wrong(p))
        ]
        raise BoundError(
            "no runtime path computes the result rightly",
            got="; ".join(said),
            todo="Nothing was written; skip those layers (--skip)",
        )
    for name, error in verification.difference.items():
        if max_error is not None and not error <= max_error:  # not-a-number is within no bound
            raise BoundError(
                "the result differs too much", where=f"output {name}", expected=f"at most {max_error:g} (--max-error)",
                got=f"{error:.4g}", todo="Nothing was written",
            )  # fmt: skip


def _floors(made: Plan) -> list[str]:
    forms = [(d.op.demands, d.form) for d in made.decisions if d.op.demands is not None and d.settings is not None]
    return [demands.since[form] for demands, form in forms if form in demands.since]


def _rows(made: Plan, notes: Mapping[str, str], staged: Stages) -> tuple[Row, ...]:
    rows = []
    for d in made.decisions:
        size = sum(t.weight.stored_bytes for _, t in made.graph.weights_of(d.op) if t.weight)
        it = staged.ops.get(d.op.id)
        reason = "; ".join(filter(None, (d.reason, notes.get(d.op.name), *(it.left if it is not None else ()))))
        row = Row(d.op.name, d.op.native, d.op.kind, d.mode, d.form, reason, size, d.op.scope)
        if it is not None and (layer := it.zeros) is not None:
            row = replace(row, sparsity=layer.sparsity, pattern=layer.pattern, lost=layer.error, pruning=layer.reason)
        row = replace(row, stages=it.done if it is not None else ())
        rows.append(row)
    return tuple(rows)


def _notes(model: TfliteModel, made: Plan, found: Statistics | None, given: Any, data: Any) -> tuple[str, ...]:
    notes = list(model.notes)
    if (
        data is None
        and any(d.settings is not None and d.settings.bias_correction for d in made.decisions)
        and found is None
    ):
        notes.append("no data was given: no bias correction, weights rounded without regard to their inputs")
    if found is not None and any(_lacks_moments(made, found, d) for d in made.decisions):
        notes.append("the statistics hold no means of some inputs: no bias correction there")
    kept = sum(d.mode == KEPT and d.op.native not in CONVERSIONS for d in made.decisions)
    if kept:
        notes.append(f"{kept} operators were quantized already; they stay as they are")
    if any("no sample reaches" in d.reason for d in made.decisions):
        notes.append(
            "a branch that no sample takes stays float, and what follows it was calibrated without its values: "
            "give samples that take every branch"
        )
    for feed in given or ():
        notes.extend(feed.samples.notes)
    return tuple(dict.fromkeys(notes))


def _lacks_moments(made: Plan, found: Statistics, decision: Decision) -> bool:
    source = activation_input(made.graph, decision.op)
    known = found.tensors.get(source) if source is not None else None
    wanted = decision.settings is not None and decision.settings.bias_correction and decision.mode != FLOAT
    return wanted and source is not None and (known is None or known.moments is None)


def _still_float(graph: Graph, recipe: Recipe, solution: Solution) -> list[str]:
    """Inputs and outputs that the recipe wants as integers, and whose operators have no integer form."""
    notes = []
    for ports, wanted, side in ((graph.inputs, recipe.inputs, "input"), (graph.outputs, recipe.outputs, "output")):
        for tensor in (graph.tensors[t] for t in ports if wanted != "float32" and t not in solution.borders):
            if tensor.dtype == "float32":
                notes.append(f"{side} {tensor.name} stays float32, not {wanted}: what it touches is not {wanted}")
    return notes


__all__ = ["Culprit", "Report", "Result", "Row", "optimize"]
