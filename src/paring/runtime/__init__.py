"""Runs models: in a child process with limits on time and memory, so that a hostile or broken model cannot take the caller
along; or in this one, with the sparse kernels of the native library.
"""

from paring.runtime.client import Limits, OutOfTime, RunError, Worker
from paring.runtime.interpreter import litert_interpreter
from paring.runtime.native import NativeError, delegate_path
from paring.runtime.program import Program, Routine, Step

__all__ = [
    "Limits",
    "NativeError",
    "OutOfTime",
    "Program",
    "Routine",
    "RunError",
    "Step",
    "Worker",
    "delegate_path",
    "litert_interpreter",
]
