"""LiteRT's .tflite behind the contracts of a format: open, graph, apply, extract, save."""
