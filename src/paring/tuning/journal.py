"""What was measured, line by line in a file: an interrupted search goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """Results by the request that they answer. A line that was cut off when the machine stopped is ignored."""

    def __init__(self, path: Path) -> None:
        """Reads what is there."""
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self.found[entry["key"]] = entry["result"]
            except (ValueError, KeyError, TypeError):
                continue
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def get(self, request: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result of a request that was answered before."""
        return self.found.get(key_of(request))

    def put(self, request: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Notes a result; it is on the disk when this returns."""
        key = key_of(request)
        self.found[key] = dict(result)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "result": result}) + "\n")


def key_of(request: Mapping[str, Any]) -> str:
    """A name for a request: the same for the same request, in any order of its keys."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:32]
