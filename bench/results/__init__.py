"""Results on disk, one folder a run: their schema, reading and writing, metrics. Imports no torch."""
