"""What a user names as `module:name`: functions that give data, classes that compress."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from typing import Any

from paring.errors import InputError


def find(text: str, what: str = "function") -> Any:
    """Imports `module:name`, from the working folder too, as `python -m` would.

    Args:
      text: `module:name`; the name may have dots.
      what: What it is, for messages.

    Raises:
      InputError: No such module or name; an error inside the module is its cause.

    >>> find("math:floor")(2.5)
    2
    """
    module_name, _, name = text.partition(":")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and module_name.startswith(str(error.name))
        raise InputError(
            "no such module" if absent else "the module cannot be imported",
            where=text,
            expected=f"module:{what}, seen from the working folder" if absent else None,
            got=f"{type(error).__name__}: {error}",
            todo="Check the name and the folder you are in"
            if absent
            else "Its traceback is kept as this error's cause",
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            near = difflib.get_close_matches(part, public, 1, 0.5)
            todo = f"Did you mean {module_name}:{near[0]}?" if near else "Check the name"
            raise InputError(f"no such {what}", where=text, expected=f"{name} in {module_name}", todo=todo)
        found = getattr(found, part)
    return found
