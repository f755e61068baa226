"""Runs models in a child process with limits on time and memory: a hostile or broken model cannot take the caller along."""

from paring.runtime.client import Limits, OutOfTime, RunError, Worker
from paring.runtime.program import Program, Routine, Step

__all__ = ["Limits", "OutOfTime", "Program", "Routine", "RunError", "Step", "Worker"]
