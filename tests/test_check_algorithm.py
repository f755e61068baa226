"""check_algorithm finds what is wrong with an algorithm, and nothing wrong with the built-in ones."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import broken_algorithms as made
import pytest

from paring.compress import Algorithm, Cluster, LowRank, Quantize, Sparsify, chain
from paring.errors import BoundError, InputError
from paring.testing import FAILED, OK, UNCHECKED, Checked, check_algorithm

BUILT_IN = {
    "sparsify": Sparsify(0.6, schedule="polynomial", end=0.5, unit="fraction", every=3),
    "n of m": Sparsify(pattern="2:4", schedule="cosine", start=1, end=2, unit="epochs", every=3),
    "cluster": Cluster(8, start=20),
    "quantize": Quantize("int4", "float", steps="lsq"),
    "low rank": LowRank(rank=4),
    "chain": chain(Sparsify(0.5, "4x1"), Cluster(16), Quantize("int8", "int8")),
}


def failing(found: Checked) -> dict[str, str]:
    return {row.check: row.detail for row in found.failures}


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_built_in_algorithms_keep_the_contract_in_numpy(name):
    assert check_algorithm(BUILT_IN[name], backends=()).ok


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["chain", "quantize"])
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_the_built_in_algorithms_keep_the_contract_in_training(name, backend):
    if importlib.util.find_spec("keras") is None or importlib.util.find_spec(backend) is None:
        pytest.skip(f"needs {backend} and Keras")
    found = check_algorithm(BUILT_IN[name], backends=(backend,))
    rows = [row for row in found.rows if row.where == backend]
    assert {"training", "gradients", "memory", "behind LowRank", "before LowRank"} <= {row.check for row in rows}
    assert all(row.outcome == OK for row in rows)


@pytest.mark.parametrize(
    ("algorithm", "check", "words"),
    [
        (made.NoDataclass(), "settings through a recipe", "Write @dataclass"),
        (made.Unwritable(levels=(1.0, 3.0)), "settings through a recipe", "a recipe"),
        (made.Flat(), "encode and decode", "decode gives shape"),
        (made.Double(), "encode and decode", "decode gives float64"),
        (made.InPlace(), "encode and decode", "encode changes its argument"),
        (made.Shrinking(), "encode and decode", "changes when it is compressed again"),
        (made.Noisy(), "the same twice", "encode gives different values twice"),
        (made.Hungry(), "memory", "times the memory of a large weight, not at most 16"),
        (made.Promising(), "behind Sparsify", "Promising promises what does not hold: no weight is 0"),
        (made.Filling(), "behind Sparsify", "Sparsify promises what does not hold"),
    ],
)
def test_what_is_wrong_without_training_is_found(algorithm, check, words):
    assert words in failing(check_algorithm(algorithm, backends=(), raises=False))[check]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("algorithm", "check", "words"),
    [
        (made.NoGradient(), "gradients", "no gradient reaches the weight"),
        (made.Idle(), "gradients", "no gradient reaches the variable idle"),
        (made.Otherwise(), "training", "encode changes what training leaves"),
        (made.Branching(), "training", ""),
        (made.Misnamed(), "training", "update gives 'scale', which is none of its variables"),
    ],
)
def test_what_is_wrong_in_training_is_found(tensorflow, algorithm, check, words):
    found = check_algorithm(algorithm, backends=("tensorflow",), raises=False)
    assert words in failing(found)[check]


@pytest.mark.timeout(600)
def test_an_algorithm_in_a_script_is_checked_and_a_failure_says_what_to_do(tensorflow, tmp_path):
    script = tmp_path / "mine.py"
    body = (
        "from dataclasses import dataclass\nfrom broken_algorithms import Halves, NoGradient\n"
        "from paring.testing import check_algorithm\n\n"
        "@dataclass(frozen=True)\nclass Mine({base}):\n    pass\n\n"
        "if __name__ == '__main__':\n    print(check_algorithm(Mine(), backends=('tensorflow',)))\n"
    )
    folder = made.__file__.rpartition("/")[0]
    ends = []
    for base in ("Halves", "NoGradient"):
        script.write_text(f"import sys\nsys.path.insert(0, {folder!r})\n" + body.format(base=base), encoding="utf-8")
        ends.append(subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=500))
    assert ends[0].returncode == 0, ends[0].stderr
    assert "training" in ends[0].stdout and FAILED not in ends[0].stdout and UNCHECKED not in ends[0].stdout
    assert ends[1].returncode and "in 'gradients' on tensorflow: no gradient reaches the weight" in ends[1].stderr


def test_a_failure_raises_with_the_table():
    with pytest.raises(
        BoundError, match="breaks the contract in 'encode and decode' on numpy: decode gives shape"
    ) as caught:
        check_algorithm(made.Flat(), backends=())
    assert "settings through a recipe" in caught.value.detail and FAILED in caught.value.detail


def test_what_cannot_be_checked_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (row,) = [row for row in check_algorithm(made.Halves(), backends=("jax",)).rows if row.where == "jax"]
    assert (row.outcome, row.detail) == (UNCHECKED, "keras is not installed")


def test_only_algorithms_and_known_backends_are_taken():
    with pytest.raises(InputError, match=r"Derive its class from paring\.compress\.Algorithm"):
        check_algorithm(Algorithm)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="unknown backend for numpy"):
        check_algorithm(made.Halves(), backends=("numpy",))
