"""Synthetic checkpoints in the true shapes of named model families, with random weights or none."""
