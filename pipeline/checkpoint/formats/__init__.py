"""The formats of weight files: one module each, so that a new format is a new module in this folder.

A format module turns the header of a file into the ``TensorInfo`` of each tensor in it: name, torch's dtype and shape,
file, offset and length. It consists of pure functions on bytes, does no I/O, and refuses malformed headers with a
CheckpointError that names the file and the remedy. Today there is one, safetensors.py, used like this:

1. files.py decides by name which files of a folder are weights, and which suffixes are refused as unsupported.
2. checkpoint.py reads the first ``PREFIX_BYTES`` of each file; ``header_length(prefix)`` says how many more to read.
3. ``parse_header(header)`` returns the tensors of the file, in the order of their offsets.

These two callers name safetensors.py directly: a second format needs a choice of format module in checkpoint.py, and
its suffix in files.py. ``TensorInfo`` is defined in safetensors.py, but means the same for all formats.
"""
