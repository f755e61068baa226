"""SavedModels from recipe to written folder: planned, observed, stored anew one weight at a time, run beside the float one."""
