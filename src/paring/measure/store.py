"""Results files: what was measured as JSON, with the version and the machine it was measured on."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from paring.errors import InputError
from paring.runtime.native import available_isa

_PACKAGES = ("numpy", "ai-edge-litert", "tensorflow", "tensorflow-cpu", "keras")


def environment() -> dict[str, Any]:
    """The machine and the versions that figures belong to.

    >>> sorted(environment())[:3]
    ['ai-edge-litert', 'cores', 'cpu']
    """
    found: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "cpu": _cpu(), "cores": os.cpu_count()}
    found["system"] = platform.system()
    if hasattr(os, "getloadavg"):
        found["load"] = round(os.getloadavg()[0], 1)
    found["kernels"] = available_isa() or "not built"
    found["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_data(command: str, body: Any) -> dict[str, Any]:
    """A results file as plain data: infinity and not-a-number, which JSON has no words for, become null.

    Args:
      command: Of the command line, e.g. `bench`.
      body: A dataclass or a dict.

    >>> as_data("bench", {"models": [float("nan"), 1.5]})
    {'paring': '0.1.0', 'command': 'bench', 'models': [None, 1.5]}
    """
    from paring import __version__

    fields = asdict(body) if is_dataclass(body) and not isinstance(body, type) else dict(body)
    found: dict[str, Any] = finite({"paring": __version__, "command": command, **fields})
    return found


def check_target(path: Path, command: str) -> None:
    """Raises where `write` would not write, before the work that makes the results."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        got = "a folder" if path.is_dir() else f"no folder {path.parent}"
        raise InputError("cannot write the results", where=str(path), expected="a file in an existing folder", got=got)
    if not path.exists():
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "paring" not in found or found.get("command") != command:
        raise InputError(
            "the file is not overwritten", where=str(path), expected=f"results of an earlier `paring {command}`",
            got="something else", todo="Name another file with --results",
        )  # fmt: skip


def write(path: Path, data: Mapping[str, Any]) -> None:
    """Writes what `as_data` gave, atomically."""
    check_target(path, data["command"])
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(data, indent=1, default=float, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        raise InputError("cannot write the results", where=str(path), got=error.strerror or str(error)) from error
    finally:
        part.unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """The same with null for infinity and not-a-number, which JSON has no words for."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = found.get("flags", "").split()
    known = [f for f in ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8") if f in flags]
    return f"{found.get('model name', platform.machine())} ({' '.join(known)})"


__all__ = ["as_data", "check_target", "environment", "finite", "write"]
