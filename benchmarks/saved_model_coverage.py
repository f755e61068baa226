"""Which SavedModels work: one small model per family of keras.applications and KerasHub, as Keras exports it.

Each family runs in a process of its own: export, `inspect`, `bf16-int8` (run beside the float model by every signature) and
`debug`. Weights and data are random: what is shown is that every step works, and how much is int8 afterwards.
Results are kept as they come: what is there is not run again, unless `--again` says so.

    python benchmarks/saved_model_coverage.py --family MobileNetV2,VGG16
    python benchmarks/saved_model_coverage.py --hub PYTHON    # an interpreter that has KerasHub, for its families
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import argparse
import collections
import contextlib
import io
import json
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import figures
import hub
import peer

RESULTS = figures.REPOSITORY / "docs" / "figures" / "saved_model_coverage.json"
SAMPLES = 4
# What each layer has to reach on its own. The outputs tell nothing: deep networks with random weights carry roundings far.
LEAST_DB = 20.0
APPLICATIONS = [name for name in families.FAMILIES if families.group(name) == "keras.applications"]
HUB = {f"KerasHub/{name}": name for name in hub.FAMILIES}
FAMILIES = [*APPLICATIONS, *HUB]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="", help="families, separated by commas; all by default")
    parser.add_argument("--hub", metavar="PYTHON", help="interpreter with KerasHub; its families are left out without")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--again", action="store_true", help="run what is in the file, too")
    parser.add_argument("--seconds", type=int, default=900, help="limit for one family")
    parser.add_argument("--child", metavar="FAMILY", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print("\n" + json.dumps(attempt(args.child), default=float), flush=True)
        return 0
    if unknown := [name for name in args.family.split(",") if name and name not in FAMILIES]:
        raise SystemExit(f"unknown family for the benchmark: expected {', '.join(FAMILIES)}, got {', '.join(unknown)}.")
    rows = json.loads(args.results.read_text(encoding="utf-8"))["rows"] if args.results.is_file() else []
    done = {row["family"] for row in rows if not args.again}
    for family in args.family.split(",") if args.family else FAMILIES:
        if family in done or (family in HUB and not args.hub):
            continue
        row = run(args.hub if family in HUB else sys.executable, family, args.seconds)
        if "trace" in row:
            print(row.pop("trace"), file=sys.stderr)
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        rows = [r for r in rows if r["family"] != family] + [row]
        write(args.results, rows)
    return 0 if all(row["result"] == "works" for row in rows) else 1


def run(python: str, family: str, seconds: int) -> dict[str, Any]:
    """A family in a child process; the row says why where the process ended without a result."""
    command = [python, __file__, "--child", family]
    group = "KerasHub" if family in HUB else "keras.applications"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return {"group": group, "family": family, "result": f"not finished in {seconds} s"}
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"result"')]
    row = found[-1] if found else {"result": peer.why(done.returncode, done.stderr)}
    return {"group": group, "family": family, **row}


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The rows in the order of the families, with the environment of the last one."""
    order = {family: at for at, family in enumerate(FAMILIES)}
    rows = sorted(rows, key=lambda row: order.get(row["family"], len(order)))
    part = path.with_name(f".{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    found = {"environment": figures.environment(), "rows": rows}
    part.write_text(json.dumps(found, indent=1, default=float) + "\n", encoding="utf-8")
    os.replace(part, path)


# -- in the child --------------------------------------------------------------------------------------------------


def attempt(family: str) -> dict[str, Any]:
    """The row of a family; what failed begins with the step at which it did."""
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {"result": "works"}
    spent: dict[str, float] = {}
    begun, at = time.time(), "build"
    try:
        with tempfile.TemporaryDirectory(prefix="coverage-") as here:
            for at, step in STEPS.items():
                begun = time.time()
                step(found, family, Path(here))
                spent[at] = round(time.time() - begun, 1)
    except (Exception, SystemExit) as error:
        words = " ".join(str(error).split())
        found |= {"result": f"{at}: {type(error).__name__}: {words[:400]}", "trace": traceback.format_exc()}
        spent[at] = round(time.time() - begun, 1)
    found.pop("x", None)
    return {**found, "seconds": round(sum(spent.values())), "spent": spent}


def export(found: dict[str, Any], family: str, here: Path) -> None:
    """The float model, and samples for it."""
    import keras

    keras.utils.set_random_seed(1)
    if family in HUB:
        model, x = hub.build(HUB[family])
    else:
        case = families.build(family)
        model, x = case.model, case.x
    found["parameters"] = model.count_params()
    found["x"] = {name: v[:SAMPLES] for name, v in x.items()} if isinstance(x, dict) else x[:SAMPLES]
    model.export(str(here / "float"), verbose=False)


def inspect(found: dict[str, Any], family: str, here: Path) -> None:
    """The command, which ends with 0."""
    del found, family
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = command("inspect", str(here / "float"))
    if code:
        raise RuntimeError(f"ends with {code}: {said.getvalue()[-300:]}")


def command(*words: str) -> int:
    """A command of paring's in this process; gives its exit code."""
    from paring.cli import main

    before, sys.argv = sys.argv, ["paring", *words]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def quantize(found: dict[str, Any], family: str, here: Path) -> None:
    """`bf16-int8`, run beside the float model by every signature."""
    del family
    import paring

    result = paring.optimize(here / "float", "bf16-int8", found["x"], output=here / "small")
    report = result.report
    verification = report.verification
    if verification is None or not verification.difference:
        raise RuntimeError(f"nothing was compared: {report.notes}")
    floats = collections.Counter((row.native, row.reason) for row in report.rows if row.mode == "float")
    found |= {
        "int8": sum(row.mode != "float" and "int8" in row.became for row in report.rows),
        "float": [
            {"operator": name, "count": n, "why": why}
            for (name, why), n in sorted(floats.items())
            if why != "has no weights"
        ],
        "error": max(verification.difference.values()),
        "bytes_over_float": report.output_bytes / report.source_bytes,
        "notes": list(report.notes),
    }
    if not found["int8"]:
        raise RuntimeError(f"nothing became int8: {found['float'][:5]}")


def debug(found: dict[str, Any], family: str, here: Path) -> None:
    """What each layer adds; every int8 operator has to be there."""
    del family
    from paring.measure.compare import compare

    seen = compare(here / "float", here / "small", found["x"], limit=2)
    ranked = [seen.layers[number] for number in seen.ranking]
    found |= {
        "layers": len(seen.layers),
        "ranked": len(ranked),
        "culprits": [seen.layers[number].name for number in seen.culprits],
        "not_ranked": sorted({layer.note for layer in seen.layers if layer.blame is None and layer.note}),
    }
    if not ranked:
        raise RuntimeError(f"no layer is ranked: {found['not_ranked']}")
    worst = min((layer for layer in ranked if layer.own is not None), key=lambda layer: layer.own.snr_db)
    found["least_db"] = worst.own.snr_db
    if not found["least_db"] >= LEAST_DB:
        raise ArithmeticError(f"{worst.name} has {found['least_db']:.1f} dB on its own")


STEPS = {"export": export, "inspect": inspect, "bf16-int8": quantize, "debug": debug}


if __name__ == "__main__":
    sys.exit(main())
