"""Measures models: latency side by side, and what operators cost."""
