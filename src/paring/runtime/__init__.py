"""Runs models in a child process with limits on time and memory: a hostile or broken model cannot take the caller along."""

from paring.runtime.client import Limits, RunError, Worker
from paring.runtime.program import Program, Routine, Step

__all__ = ["Limits", "Program", "Routine", "RunError", "Step", "Worker"]
