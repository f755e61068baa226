"""Runs models in a child process with limits on time and memory: a hostile or broken model cannot take the caller along."""

from paring.runtime.client import Limits, RunError, Worker

__all__ = ["Limits", "RunError", "Worker"]
