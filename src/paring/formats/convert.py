"""Keras and SavedModel to float `.tflite`, in a child process: TensorFlow may abort, the caller stays alive."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paring.errors import InputError, ParingError, UnsupportedError

_NEED = 'Install it: pip install "paring[tf]" tensorflow-cpu'
_LOAD_FAILED = "cannot load"
QUIET = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": "-1"}
"""Variables that make a child's TensorFlow work on the CPU and say little."""


@dataclass(frozen=True)
class Outcome:
    """What became of one conversion: `error` is None when the file was written."""

    error: ParingError | None = None
    notes: tuple[str, ...] = ()


def to_tflite(source: str | os.PathLike[str] | Any, out_path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Converts a model to a float32 `.tflite` file with builtin operators only.

    The batch stays dynamic, except for recurrent layers (LSTM, GRU, ...): theirs is fixed, to 1 unless the model says
    otherwise. Signatures of a SavedModel are kept; a Keras model gets `serving_default` with its input names.
    Nothing is quantized, and a result that would need Flex (TensorFlow inside LiteRT) is refused.

    Args:
      source: A `.keras` or `.h5` file, a SavedModel folder, or a live Keras 3 model. A live model is saved to a
        temporary `.keras` file; where that cannot be loaded again (classes of your own), it is exported right here.
      out_path: The file to write, atomically.

    Returns:
      Notes for the user, e.g. that a batch was fixed.

    Raises:
      UnsupportedError: TensorFlow or Keras is not installed, the model needs Flex operators or code from elsewhere.
      InputError: The source is missing, broken, or no model.

    >>> to_tflite("absent.keras", "out.tflite")
    Traceback (most recent call last):
    paring.errors.InputError: no such model for absent.keras: expected a .keras or .h5 file or a SavedModel folder. \
Check the path.
    """
    out = Path(out_path)
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise InputError(
            "cannot write", where=str(out), expected="a file name in an existing folder", todo="Choose another path"
        )
    live = not isinstance(source, (str, os.PathLike))
    if live:
        _check_live(source)
    else:
        check_file(Path(source))
    check_installed("tensorflow", *(["keras"] if live or not Path(source).is_dir() else []))
    with tempfile.TemporaryDirectory(dir=out.absolute().parent, prefix=".paring-") as name:
        work = Path(name)
        result = work / "model.tflite"
        outcome = _convert_live(source, result, work) if live else convert_all([(Path(source), result)], work)[0]
        if outcome.error:
            raise outcome.error
        os.replace(result, out)
    return outcome.notes


def convert_all(jobs: Sequence[tuple[Path, Path]], work: Path) -> list[Outcome]:
    """Converts several models in one child, which saves the start of TensorFlow (about 6 s) for all but the first.

    Args:
      jobs: Pairs of source and output path.
      work: A folder for the child's log.

    Returns:
      One outcome per job; if the child dies, those it had not finished carry its last error line.
    """
    log = work / "child.log"
    # It runs in `work`, because `-m` imports from the working folder, and a random.py there is not ours to import.
    command = [sys.executable, "-m", "paring.formats.convert_child"]
    command += [str(path.absolute()) for job in jobs for path in job]
    with log.open("wb") as sink:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment(), cwd=work)
    outcomes = []
    for source, out in jobs:
        report = out.with_name(out.name + ".json")
        if report.exists():
            found = json.loads(report.read_text(encoding="utf-8"))
            report.unlink()
            kind = UnsupportedError if found.get("error") not in (None, "InputError") else InputError
            error = kind(found["message"]) if "message" in found else None
            outcomes.append(Outcome(error, tuple(found.get("notes", ()))))
        else:
            outcomes.append(Outcome(_died(source, done.returncode, log)))
    return outcomes


def _convert_live(model: Any, out: Path, work: Path) -> Outcome:
    saved = work / f"{re.sub(r'[^0-9A-Za-z_.-]', '_', str(model.name))}.keras"
    parts = [model, *getattr(model, "_flatten_layers", list)()]
    try:
        importable = all(type(part).__module__ != "__main__" for part in parts)
        if importable:  # by the child, which cannot see the script that runs here
            model.save(saved)
    except Exception:  # a model that cannot be saved may still be traced
        importable = False
    if importable:
        outcome = convert_all([(saved, out)], work)[0]
        if outcome.error is None or not str(outcome.error).startswith(_LOAD_FAILED):
            return outcome
    from paring.formats import keras as keras_format

    folder = work / saved.stem
    keras_format.export_saved_model(model, folder)
    outcome = convert_all([(folder, out)], work)[0]
    if outcome.error is None or "TensorList" not in str(outcome.error):
        return outcome
    shutil.rmtree(folder)
    keras_format.export_saved_model(model, folder, static_batch=True)
    outcome = convert_all([(folder, out)], work)[0]
    return Outcome(outcome.error, (*outcome.notes, "the batch is fixed, because LiteRT loops need that"))


def _check_live(model: Any) -> None:
    modules = [cls.__module__.partition(".")[0] for cls in type(model).__mro__]
    if "keras" not in modules or not hasattr(model, "export"):
        raise InputError(
            "not a model",
            expected="a path or a live Keras 3 model",
            got=f"{type(model).__module__}.{type(model).__qualname__}",
            todo="Save it as a SavedModel and give its folder",
        )


def check_file(path: Path) -> None:
    """Says what is wrong with a file at once, before TensorFlow takes seconds to start."""
    kinds = "a .keras or .h5 file or a SavedModel folder"
    todo = "Save it again with model.save()"
    if not path.exists():
        raise InputError("no such model", where=str(path), expected=kinds, todo="Check the path")
    if path.is_dir():
        if not any((path / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
            raise InputError(
                "not a SavedModel", where=str(path), expected="saved_model.pb in it", todo="Check the path"
            )
    elif path.suffix == ".keras":
        try:
            with zipfile.ZipFile(path) as archive:
                absent = {"config.json", "model.weights.h5"} - set(archive.namelist())
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise InputError(
                "cannot load the model",
                where=str(path),
                expected="a .keras archive",
                got=f"no ZIP ({error})",
                todo=todo,
            ) from error
        if absent:
            raise InputError(
                "cannot load the model",
                where=str(path),
                expected="a .keras archive",
                got=f"a ZIP without {', '.join(sorted(absent))}",
                todo=todo,
            )
    elif path.suffix in (".h5", ".hdf5"):
        with path.open("rb") as file:
            if file.read(8) != b"\x89HDF\r\n\x1a\n":
                raise InputError(
                    "cannot load the model", where=str(path), expected="an HDF5 file", got="something else", todo=todo
                )
    else:
        raise InputError("cannot convert", where=str(path), expected=kinds, got=f"a {path.suffix or 'plain'} file")


def check_installed(*modules: str, purpose: str = "converting to .tflite") -> None:
    """Raises UnsupportedError for the first module that is missing, with what to install."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise UnsupportedError(f"{module} is not installed: {purpose} needs it", todo=_NEED)


def environment() -> dict[str, str]:
    """All variables of the child that converts."""
    package = str(Path(__file__).parents[2])
    path = [os.path.abspath(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.environ | {"PYTHONPATH": os.pathsep.join([*path, package])} | QUIET


def _died(source: Path, code: int, log: Path) -> InputError:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 65536))
        line = last_error_line(file.read().decode(errors="replace"))
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return InputError(
        "cannot convert to LiteRT",
        where=source.name,
        got=f"the converter died with {how} ({line})",
        todo="Check the model in TensorFlow itself; if memory ran out, convert on a larger machine",
    )


def last_error_line(log: str) -> str:
    """The last line of a log that names an error, else the last line with words in it.

    >>> last_error_line("F0000 lite.cc:12] Check failed: x != null\\n*** SIGABRT ***\\n    @ 0x7f main\\n")
    'F0000 lite.cc:12] Check failed: x != null'
    """
    lines = [line.strip() for line in log.splitlines() if re.search(r"[A-Za-z]{3}", line)]
    errors = [line for line in lines if re.search(r"^F\d{4}|Check failed|[Ee]rror\b|Killed|terminate called", line)]
    return (errors or lines or ["it said nothing"])[-1][:300]
