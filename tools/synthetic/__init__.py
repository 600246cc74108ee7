"""Checkpoints in the true shapes of named families, with random weights or none."""
