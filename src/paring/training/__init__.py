"""Training-time compression of live Keras 3 models; Keras is imported when a function is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paring.training.attaching import attach, finalize
    from paring.training.bench import bench_algorithms
    from paring.training.exporting import export
    from paring.training.persist import load_model

_WHERE = {
    "attach": "attaching",
    "bench_algorithms": "bench",
    "finalize": "attaching",
    "export": "exporting",
    "load_model": "persist",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)


__all__ = ["attach", "bench_algorithms", "export", "finalize", "load_model"]
