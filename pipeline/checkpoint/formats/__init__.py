"""The formats of weight files: safetensors.py, torch_bin.py (of which zip_directory.py and tensor_pickle.py) and gguf.py.

format.py says what a format is, registry.py which there are. A format decides which files of a folder are a model, and
turns the header of a file into the ``TensorInfo`` of each tensor in it. It does no I/O: a generator asks for the ranges
of bytes that it needs, and checkpoint.py reads them, blocking or not. A malformed header is refused with a
CheckpointError that names the file and the remedy.
"""
