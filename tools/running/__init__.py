"""Measured runs of a model for the commands: a generation, or a number of sweeps."""
