"""SavedModel: the only importer of TensorFlow, and only when a function is called."""
