"""The formats of weight files: one module each, so that a new format is a new module in this folder.

format.py says what a format is, registry.py which there are. A format decides which files of a folder are a model, and
turns the header of a file into the ``TensorInfo`` of each tensor in it. It does no I/O: a generator asks for the ranges
of bytes that it needs, and checkpoint.py reads them, blocking or not. A malformed header is refused with a
CheckpointError that names the file and the remedy.
"""
