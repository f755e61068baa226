"""export: the trained model as an integer `.tflite`, by the writer of every other file; `saved_model` does folders.

The model is exported as floats: weights folded and on their grids, and every site marked by a pair of QUANTIZE and DEQUANTIZE.
The writer reads the marks as ranges. Names that the trace gives to operations tell which rule each operator follows.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from paring.compress.quantize import Quantize
from paring.decision import STATIC
from paring.errors import UnsupportedError
from paring.folders.native import check_runtime
from paring.formats import keras as keras_format
from paring.formats.convert import convert_all, environment
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.view import view
from paring.graph import Graph, OpId
from paring.optimize import Result, check_target, optimize
from paring.plan import plan
from paring.recipe import Recipe, Rule
from paring.solve import requests
from paring.training.assign import Place
from paring.training.attaching import attachment_of
from paring.training.attachment import Attachment

_SHAPES = ("RESHAPE", "SQUEEZE", "EXPAND_DIMS")
LABEL = re.compile(r"paring(\d+)")


@dataclass(frozen=True)
class Trained(Recipe):
    """A recipe whose rules were matched in the Keras model already.

    Attributes:
      chosen: The rule of each operator of the file, and why.
    """

    chosen: Mapping[OpId, tuple[Rule | None, str]] = field(default_factory=dict, compare=False)

    def winners(self, graph: Graph) -> dict[OpId, tuple[Rule | None, str]]:
        """What was found."""
        return {op.id: self.chosen.get(op.id, (None, "no rule matches")) for op in graph.ops}


def export(
    model: Any,
    path: str | os.PathLike[str],
    data: Any = None,
    *,
    overwrite: bool = False,
    strict: bool = False,
    verified: bool = True,
    max_error: float | None = None,
    inputs: str = "float32",
    outputs: str = "float32",
    runtime: str | None = None,
) -> Result:
    """Writes a model behind `attach` as a `.tflite` file with the trained ranges, or as a SavedModel.

    Args:
      model: The model; it stays as it is, and may train on.
      path: The file; a name without a suffix is the folder of a SavedModel, for recipes with float or bfloat16 activations.
      data: Samples for what has no trained range (the inside of a layer of one's own, of a normalization): with them it becomes
        integer too, without them it stays float, and the report says so.
      overwrite: Whether the file may exist.
      strict: Refuse to leave a float operator.
      verified: Run the result, operator by operator.
      max_error: Bound on the relative difference of every output.
      inputs: Type of the model's inputs: float32, int8, uint8 or int16.
      outputs: The same for outputs.
      runtime: What runs a SavedModel: `portable` (the default) or `native`, see `paring.optimize`.

    Returns:
      What `paring.optimize` returns: the model and its report.

    Raises:
      InputError: Nothing is attached, the path cannot be written, or a range was never seen or is not finite.
    """
    attachment = attachment_of(model)
    if not Path(path).suffix:
        from paring.training.saved_model import export_folder  # which takes names from here

        if strict or {inputs, outputs} != {"float32"}:
            raise UnsupportedError(
                "cannot export to a SavedModel", where=str(path), expected="float inputs and outputs",
                got="strict" if strict else "integers", todo="Name a .tflite file",
            )  # fmt: skip
        return export_folder(
            attachment,
            path,
            data,
            overwrite=overwrite,
            verified=verified,
            max_error=max_error,
            runtime=runtime or "portable",
        )
    check_runtime(runtime)
    target = check_target(path, overwrite)
    for site in attachment.sites.all():
        attachment.range(site)
    with tempfile.TemporaryDirectory(prefix="paring-") as folder:
        marked = Path(folder) / "marked.tflite"
        notes = _marked(attachment, marked, Path(folder))
        return from_marked(
            attachment, marked, data, notes=notes, inputs=inputs, outputs=outputs, output=target, overwrite=overwrite,
            strict=strict, verified=verified, max_error=max_error,
        )  # fmt: skip


def from_marked(
    attachment: Attachment,
    marked: Path,
    data: Any = None,
    *,
    notes: tuple[str, ...] = (),
    inputs: str = "float32",
    outputs: str = "float32",
    **options: Any,
) -> Result:
    """What `export` makes of the float file with marks; `options` are those of `optimize`."""
    source = TfliteModel.open(marked)
    source.notes, source.path = notes, f"{attachment.model.name} (Keras)"
    _mend(source)
    found = _named(source, attachment)
    _bare_outputs(source)
    recipe = _recipe(source, attachment, found, ranged=data is not None)
    return optimize(source, replace(recipe, inputs=inputs, outputs=outputs), data, **options)


# -- the float file, with marks ----------------------------------------------------------------------------------------


def _marked(attachment: Attachment, out: Path, work: Path) -> tuple[str, ...]:
    """Converts the model with its marks, and returns notes."""
    outcome = None
    for static in (False, True):
        folder = work / f"marked{int(static)}"
        save_marked(attachment, folder, work, static_batch=static)
        outcome = convert_all([(folder, out)], work)[0]
        shutil.rmtree(folder)
        if outcome.error is None:
            return (*outcome.notes, *(["its batch is fixed, because LiteRT loops need that"] if static else []))
        if "TensorList" not in str(outcome.error):
            break
    assert outcome is not None and outcome.error is not None
    raise outcome.error


def save_marked(
    attachment: Attachment, folder: Path, work: Path, *, static_batch: bool, variables: bool = False
) -> None:
    """Writes the model with its marks as a SavedModel, on any backend; `work` is for what lies about meanwhile."""
    if keras.backend.backend() == "tensorflow":
        write_marked(attachment, folder, static_batch=static_batch, variables=variables)
    else:
        saved = work / "attached.keras"
        attachment.model.save(saved)
        _in_child([str(saved), str(folder), str(int(static_batch)), str(int(variables))], work)


def _in_child(arguments: list[str], work: Path) -> None:
    """Another process, with TensorFlow as its backend, loads the saved model and writes it marked."""
    command = [sys.executable, "-m", "paring.training.export_child", *arguments]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment(), cwd=work
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UnsupportedError(
            "cannot export from this backend", where=keras.backend.backend(), expected="a model that loads under TensorFlow",
            got=lines[-1][:300] if lines else f"exit code {done.returncode}",
            todo="Classes of your own must be importable (on PYTHONPATH, registered with Keras); or load the saved model with "
            "KERAS_BACKEND=tensorflow and export there",
        )  # fmt: skip


def write_marked(attachment: Attachment, folder: Path, *, static_batch: bool, variables: bool = False) -> None:
    """Writes the model with its marks as a SavedModel; the backend is TensorFlow. See `Attachment.annotating`."""
    with attachment.annotating(variables=variables):
        attachment.state.hiding(keras_format.export_saved_model)(attachment.model, folder, static_batch=static_batch)


def _mend(source: TfliteModel) -> None:
    """Puts a DEQUANTIZE in front of float operators that read a mark's integers.

    The converter takes it away behind a reshape in front of FULLY_CONNECTED, and leaves a file that does not run.
    """
    for subgraph in source.subgraphs:
        kinds = [source.native(op) for op in subgraph.operators]
        marks = {
            int(op.outputs[0]): op for op, kind in zip(subgraph.operators, kinds, strict=True) if kind == "QUANTIZE"
        }
        unpacks = next((op for op, kind in zip(subgraph.operators, kinds, strict=True) if kind == "DEQUANTIZE"), None)
        mended: list[Any] = []
        for op, kind in zip(subgraph.operators, kinds, strict=True):
            for place, tensor in enumerate(int(t) for t in op.inputs):
                if tensor not in marks or kind in ("QUANTIZE", "DEQUANTIZE") or unpacks is None:
                    continue
                real = subgraph.tensors[int(marks[tensor].inputs[0])].clone()
                real.name = f"{real.name}/mark"
                subgraph.tensors.append(real)
                behind = unpacks.clone()
                behind.inputs = np.array([tensor], np.int32)
                behind.outputs = np.array([len(subgraph.tensors) - 1], np.int32)
                op.inputs = np.where(np.arange(len(op.inputs)) == place, behind.outputs[0], op.inputs).astype(np.int32)
                mended.append(behind)
            mended.append(op)
        subgraph.operators = mended


def _bare_outputs(source: TfliteModel) -> None:
    """Moves outputs in front of their marks, where what makes them can write integers."""
    for number, subgraph in enumerate(source.subgraphs):
        maker = {int(op.outputs[0]): op for op in subgraph.operators if source.native(op) in ("QUANTIZE", "DEQUANTIZE")}
        for place, output in enumerate(int(t) for t in subgraph.outputs):
            behind = maker.get(output)
            mark = maker.get(int(behind.inputs[0])) if behind is not None else None
            if mark is None:
                continue
            front = int(mark.inputs[0])
            subgraph.outputs = np.where(np.arange(len(subgraph.outputs)) == place, front, subgraph.outputs).astype(
                np.int32
            )
            tensors = subgraph.tensors
            tensors[front].name, tensors[output].name = tensors[output].name, tensors[front].name
            for signature in source.root.signature_defs or ():
                for entry in (signature.outputs or ()) if signature.subgraph_index == number else ():
                    entry.tensor_index = front if entry.tensor_index == output else entry.tensor_index


# -- rules of its operators --------------------------------------------------------------------------------------------


def _named(source: TfliteModel, attachment: Attachment) -> dict[OpId, list[Place]]:
    """The operations that each operator belongs to, by its name; then tensors are named by layer paths.

    What only gives a shape to the model's output has the output's name, and belongs to what makes its input.
    """
    graph = view(source, fold_ranges=True)
    places = attachment.settings
    found = {op.id: [places[int(n)] for n in LABEL.findall(op.name) if int(n) in places] for op in graph.ops}
    makers = graph.producers()
    for op in graph.ops:
        if op.native in _SHAPES and not found[op.id] and op.inputs[0] in makers:
            found[op.id] = found[makers[op.inputs[0]].id]
    for subgraph in source.subgraphs:
        for tensor in subgraph.tensors:
            if tensor.name and LABEL.search(tensor.name):
                tensor.name = readable(tensor.name, places)
    return found


def readable(name: str, places: Mapping[int, Place]) -> str:
    """A name of layers instead of scopes.

    >>> readable("functional_1/conv_1/paring2/conv2d;functional_1/relu_1/paring3/Relu", {})
    'functional_1/conv_1/conv2d;functional_1/relu_1/Relu'
    """
    parts = []
    for part in name.split(";"):
        label = list(LABEL.finditer(part))
        if label and (known := places.get(int(label[-1][1]))) is not None:
            parts.append(known.path + part[label[-1].end() :])
        else:
            parts.append(re.sub(r"paring\d+/", "", part))
    return ";".join(dict.fromkeys(parts))


def _recipe(source: TfliteModel, attachment: Attachment, found: Mapping[OpId, list[Place]], *, ranged: bool) -> Recipe:
    """The rules of the file's operators; what has no range keeps its weights as integers and its activations float."""
    graph = view(source, fold_ranges=True)
    own = attachment.recipe
    chosen: dict[OpId, tuple[Rule | None, str]] = {}
    for op in graph.ops:
        here = found.get(op.id, [])
        weighted = any(True for _ in graph.weights_of(op))
        place = (
            next((p for p in here if p.parts), here[0] if here else None) if weighted else (here[-1] if here else None)
        )
        quantize = _settings(place.quantize) if place is not None else None
        if quantize is None:
            chosen[op.id] = (None, place.reason if place is not None else "no layer of the recipe")
        else:
            assert place is not None
            chosen[op.id] = (Rule(stages=(quantize,), name=re.escape(place.path)), place.reason)
    rules = tuple(replace(r, stages=tuple(_known(stage) for stage in r.stages)) for r in own.rules)
    trained = Trained(
        rules, own.name, own.description, own.inputs, own.outputs, source=own.source, chosen=chosen
    )  # fmt: skip
    if ranged:
        return trained
    while True:
        made = plan(graph, trained)
        wanted = {t for t, parts in requests(made).items() if "range" in parts}
        bare = [d for d in made.decisions if d.mode == STATIC and wanted & {*d.op.inputs, *d.op.outputs}]
        if not bare:
            return trained
        for d in bare:
            rule, why = chosen[d.op.id]
            assert rule is not None and d.settings is not None
            weighted = any(True for _ in graph.weights_of(d.op))
            loose = Rule(stages=(replace(d.settings, activations="dynamic"),), name=rule.name) if weighted else None
            chosen[d.op.id] = (loose, f"{why}; no range was trained inside this layer (export with data gives it one)")


def _settings(quantize: Quantize | None) -> Quantize | None:
    """How the writer finds the trained numbers again: they lie on min-max grids, to be rounded to nearest."""
    if quantize is None:
        return None
    return replace(_known(quantize), range="minmax", rounding="nearest", bias_correction=False)


def _known(stage: Any) -> Any:
    """A stage as LiteRT knows it: without bfloat16 activations."""
    return replace(stage, activations="float") if getattr(stage, "activations", "") == "bfloat16" else stage
