"""Converts a checkpoint to fewer bytes, in the form of compressed-tensors."""
