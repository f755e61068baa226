"""Large models are verified one operator at a time; the pieces say what the whole says."""

from __future__ import annotations

import pytest

import paring
from paring import verify
from paring.demo import load_digits, model_path
from paring.piecewise import pieces


@pytest.mark.parametrize("recipe", ["dynamic-int8", "int8"])
def test_every_quantized_operator_becomes_a_piece_and_passes(recipe, monkeypatch):
    monkeypatch.setattr(verify, "LARGE", 1)
    calibration = load_digits()[0][:8]
    found = paring.optimize(model_path(), recipe, calibration).report.verification
    assert found is not None and not found.failed
    monkeypatch.undo()
    whole = paring.optimize(model_path(), recipe, calibration).report.verification
    assert whole is not None
    for path in verify.PATHS:
        assert {f.name for f in found.findings[path]} == {f.name for f in whole.findings[path]}
        assert not found.wrong(path)


def test_a_large_model_without_data_is_not_run_whole(monkeypatch):
    monkeypatch.setattr(verify, "LARGE", 1)
    found = paring.optimize(model_path(), "dynamic-int8").report.verification
    assert found is not None
    assert found.findings and not found.difference
    assert any("one by one" in note for note in found.notes)


def test_a_piece_holds_one_operator_and_its_twin(tmp_path):
    model = paring.optimize(model_path(), "dynamic-int8", verified=False).model
    for piece, probes, sample in pieces(model, tmp_path / "piece.tflite"):
        assert len(probes) == 1 and len(sample) == 1
        natives = [piece.native(op) for op in piece.subgraphs[0].operators]
        assert natives.count(probes[0].native) == 2
