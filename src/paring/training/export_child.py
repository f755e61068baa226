"""Writes an attached model, saved under another backend, as a SavedModel: `python -m ... MODEL FOLDER STATIC VARIABLES`."""

from __future__ import annotations

import sys
from pathlib import Path

from paring.training.attaching import attachment_of
from paring.training.exporting import write_marked
from paring.training.persist import load_model


def main(arguments: list[str]) -> int:
    """Does it."""
    source, folder, static, variables = arguments
    attachment = attachment_of(load_model(source, compile=False))
    write_marked(attachment, Path(folder), static_batch=static == "1", variables=variables == "1")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
