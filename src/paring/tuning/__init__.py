"""Finds the recipe that fits a bound on accuracy, size or latency: sensitivity first, then a search, all measured."""

from paring.tuning.tune import Tuned, tune

__all__ = ["Tuned", "tune"]
