"""Says what was done: in the terminal (`terminal`), as JSON, and as one HTML file (`page`)."""

from paring.report.terminal import console, short_name, show, show_verification, size, to_data, to_json

__all__ = ["console", "short_name", "show", "show_verification", "size", "to_data", "to_json"]
