"""Unpacking with torch's own operations, for processes without numba. Bits equal those of the kernels."""
