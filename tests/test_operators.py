"""Every row of the operator table, between other operators, in every form it names: planned, written, run, compared.

The cases are in `models.py`; what they are held to is in the rows. All cases of a recipe are one model, so that a
recipe costs one optimization and one verification; where that model cannot be run, halves of it are tried until the
case is found.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from models import CASES, Case, Const, build

from paring import optimize
from paring.data import feeds
from paring.errors import ParingError
from paring.formats.tflite.model import TfliteModel
from paring.formats.tflite.operators import TABLE, Row
from paring.optimize import Row as Line
from paring.plan import SMALL
from paring.runtime import Worker
from paring.verify import PATHS, Finding, Verification, verify

STATIC = {"int8": "int8", "int8-int16": "int16", "int4-int8": "int8"}
WEIGHTED = ("dynamic-int8", "dynamic-int4", "dynamic-int4-block32", "weight-only-int8", "float16")
ALL = [case for cases in CASES.values() for case in cases]

# Cases that do not become what their row offers, and what the report has to say instead.
EXCEPT = {
    "QUANTIZE": "a conversion in the source model",  # looked through; the tensor before it keeps its grid
    "DEQUANTIZE": "a conversion in the source model",
    "UNIDIRECTIONAL_SEQUENCE_LSTM/peephole": "not known to be right with input 9",
    "SVDF/linear": "right only where fused_activation_function is 1",
    "DIV/small divisor": "out of the kernels' reach",
    "BIDIRECTIONAL_SEQUENCE_RNN/auxiliary": "not known to be right with input 9",  # weight-only in dynamic recipes
}


@dataclass
class Outcome:
    """What became of one case under one recipe."""

    line: Line | None = None
    findings: dict[str, Finding] = field(default_factory=dict)
    differences: list[float] = field(default_factory=list)
    error: str = ""


def weighted(case: Case) -> bool:
    """Whether it has weights worth quantizing."""
    ports = {w.input for w in TABLE[case.op].weights}
    constants = [c.values for i, c in enumerate(case.inputs) if i in ports and isinstance(c, Const)]
    return sum(values.size for values in constants) >= SMALL


def run(recipe: str, cases: Sequence[Case]) -> Iterator[tuple[str, Outcome]]:
    source, data = build(cases)
    try:
        result = optimize(source.to_bytes(), recipe, data, verified=False)
        shown = verify(source, result.model, feeds(source, data))
        if shown.failed or shown.skipped:
            raise ParingError(str(shown.failed or shown.skipped))
    except ParingError as error:
        if len(cases) == 1:
            yield cases[0].name, Outcome(error=str(error))
            return
        yield from run(recipe, cases[: len(cases) // 2])
        yield from run(recipe, cases[len(cases) // 2 :])
        return
    lines = {line.name: line for line in result.report.rows}
    for case in cases:
        yield case.name, Outcome(lines[case.name], found(shown, case), differences(shown, case))


def found(shown: Verification, case: Case) -> dict[str, Finding]:
    names = (case.name, f"{case.name}_linear")  # where a fused activation was taken out
    return {path: f for path, findings in shown.findings.items() for f in findings if f.name in names}


def differences(shown: Verification, case: Case) -> list[float]:
    return [
        d for name, d in shown.difference.items() if name.rstrip("*").removesuffix(":real").split("#")[0] == case.name
    ]


@pytest.fixture(scope="session")
def outcome() -> Callable[[str, Case], Outcome]:
    """What became of a case under a recipe; all cases of a recipe are tried at the first question."""
    known: dict[str, dict[str, Outcome]] = {}

    def ask(recipe: str, case: Case) -> Outcome:
        if recipe not in known:
            cases = ALL if recipe in STATIC and recipe != "int4-int8" else [c for c in ALL if weighted(c)]
            known[recipe] = dict(run(recipe, cases))
        return known[recipe][case.name]

    return ask


def cases(recipes: Sequence[str], wanted: Callable[[str, Case], bool]) -> pytest.MarkDecorator:
    pairs = [(recipe, case) for recipe in recipes for case in ALL if wanted(recipe, case)]
    return pytest.mark.parametrize(("recipe", "case"), [pytest.param(r, c, id=f"{r}-{c.name}") for r, c in pairs])


def judge(case: Case, outcome: Outcome, form: str, allowed: float) -> None:
    """The plan said `form`, both paths compute it as the row says, and the whole stays near float."""
    line = outcome.line
    assert line is not None, outcome.error
    assert (line.form, line.reason) == (form, line.reason)
    if (
        form != "float" and case.op != "UNIQUE"
    ):  # nothing is compared element by element where the shape depends on data
        assert set(outcome.findings) == set(PATHS)
    for path, finding in outcome.findings.items():
        assert finding.right, f"{path}: {finding.quanta:g} quanta, allowed {finding.allowed:g}"
    assert outcome.differences
    assert max(outcome.differences) <= allowed


def static_form(row: Row, recipe: str) -> str:
    form = STATIC[recipe]
    narrow = f"{form}-int4"
    return narrow if recipe == "int4-int8" and row.kind in ("conv2d", "dense") and narrow in row.versions else form


def dynamic_form(case: Case, recipe: str) -> str:
    versions = TABLE[case.op].versions if recipe.startswith("dynamic") else {}
    kernel = next((c for i, c in enumerate(case.inputs) if any(w.input == i for w in TABLE[case.op].weights)), None)
    blocks = isinstance(kernel, Const) and kernel.values.ndim == 2 and kernel.values.shape[1] % 32 == 0
    wanted = ["dynamic-int4-block"] if recipe.endswith("block32") and blocks else []
    wanted += ["dynamic-int4"] if "int4" in recipe else []
    return next((form for form in (*wanted, "dynamic-int8", "codes-int8") if form in versions), "float")


def test_every_row_has_a_case() -> None:
    assert CASES.keys() == TABLE.keys()
    names = [case.name for case in ALL]
    assert len(set(names)) == len(names)
    assert EXCEPT.keys() <= set(names)


@cases(STATIC, lambda recipe, case: recipe != "int4-int8" or weighted(case))
def test_static(recipe: str, case: Case, outcome: Callable[[str, Case], Outcome]) -> None:
    row, got = TABLE[case.op], outcome(recipe, case)
    assert got.line is not None, got.error
    form = static_form(row, recipe)
    if case.name in EXCEPT and (form in row.versions):
        assert got.line.mode in ("float", "kept")
        assert EXCEPT[case.name] in got.line.reason or recipe == "int8-int16"
        form = "float"
    elif form not in row.versions:
        assert got.line.mode == "float"
        assert f"no {form} kernel for {case.op}" in got.line.reason
        form = "float"
    else:
        assert got.line.mode == "static", got.line.reason
    around = sum(TABLE[op].difference(STATIC[recipe]) for op in ("ADD", "MUL"))
    if got.line.mode == "kept":
        own = TABLE["QUANTIZE"].difference("int8")
    else:  # a float operator too may enlarge what its operands are off by
        own = row.difference(form) or row.difference(STATIC[recipe]) + TABLE["ADD"].difference(STATIC[recipe])
    judge(case, got, form, around + own)


@cases(WEIGHTED, lambda recipe, case: weighted(case))
def test_weights(recipe: str, case: Case, outcome: Callable[[str, Case], Outcome]) -> None:
    got = outcome(recipe, case)
    assert got.line is not None, got.error
    form = dynamic_form(case, recipe)
    if case.name in EXCEPT and EXCEPT[case.name] in got.line.reason:
        form = "float"
    assert got.line.mode == ("weight-only" if form == "float" else "dynamic"), got.line.reason
    stored = "weight-only-int4" if "int4" in recipe else "weight-only-int8"
    judge(case, got, form, TABLE[case.op].difference(stored if form == "float" else form))


@pytest.fixture(scope="session")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Results of all cases, from the model as it was made and as it was read and written again."""
    source, data = build(ALL)
    folder = tmp_path_factory.mktemp("unchanged")
    (folder / "made.tflite").write_bytes(source.to_bytes())
    TfliteModel.open(folder / "made.tflite").save(folder / "saved.tflite")
    [feed] = feeds(source, data)
    with Worker() as worker:
        for name in ("made", "saved"):
            worker.load(name, folder / f"{name}.tflite")
        results = [worker.run(name, feed.head(1)[0]) for name in ("made", "saved")]
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for name, *pair in zip(feed.outputs, *results, strict=True):
        found.setdefault(name.rstrip("*").removesuffix(":real").split("#")[0], []).append((pair[0], pair[1]))
    return found


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in ALL])
def test_loading_and_saving_changes_nothing(case: Case, unchanged: dict) -> None:
    assert len(unchanged[case.name]) == len(case.outputs)
    for made, saved in unchanged[case.name]:
        assert made.dtype == saved.dtype
        np.testing.assert_array_equal(made, saved)


def test_a_grouped_convolution_has_a_scale_for_each_channel() -> None:
    [case] = [c for c in ALL if c.name == "CONV_2D/grouped"]
    source, data = build([case])
    whole = {"weights": "int8", "activations": "dynamic", "granularity": "tensor"}
    result = optimize(source.to_bytes(), {"rules": [{"kind": "*", "apply": {"quantize": whole}}]}, data)
    [line] = [line for line in result.report.rows if line.name == case.name]
    assert line.form == "dynamic-int8"
    assert "groups need one scale per channel" in line.reason
    assert result.report.verification is not None
    assert not result.report.verification.failed


# -- state ---------------------------------------------------------------------------------------------------------


STATEFUL = ("UNIDIRECTIONAL_SEQUENCE_LSTM", "UNIDIRECTIONAL_SEQUENCE_LSTM/projection, bias", "LSTM", "SVDF")


@pytest.mark.parametrize("name", STATEFUL)
def test_state_follows_float_over_twenty_runs(name: str, tmp_path: os.PathLike[str]) -> None:
    [case] = [c for c in ALL if c.name == name]
    source, data = build([case], samples=20)
    result = optimize(source.to_bytes(), "int8", data, verified=False)
    source.save(f"{tmp_path}/float.tflite")
    result.save(f"{tmp_path}/int8.tflite")
    [feed] = feeds(source, data)
    with Worker() as worker:
        for kind in ("float", "int8"):
            worker.load(kind, f"{tmp_path}/{kind}.tflite", stream=True)
        pairs = [(worker.run("float", sample)[0], worker.run("int8", sample)[0]) for sample in feed]
    wanted, got = (np.stack(side).astype(np.float64) for side in zip(*pairs, strict=True))
    assert np.abs(wanted[-1]).max() > 0.1
    last = np.linalg.norm(got[-5:] - wanted[-5:]) / np.linalg.norm(wanted[-5:])
    assert last <= TABLE[case.op].difference("int8")


def test_a_cell_state_beyond_the_kernels_stays_float() -> None:
    [case] = [c for c in ALL if c.name == "UNIDIRECTIONAL_SEQUENCE_LSTM"]
    inputs = list(case.inputs)
    for gate in (12, 13, 14):  # gates wide open: the cell grows by one at every step
        inputs[gate] = Const(np.full(16, 20.0, np.float32))
    source, data = build([Case(case.op, tuple(inputs), case.outputs, case.options)], samples=20)
    [line] = [r for r in optimize(source.to_bytes(), "int8", data, verified=False).report.rows if r.native == case.op]
    assert line.mode == "float"
    assert "cell state reaches" in line.reason
