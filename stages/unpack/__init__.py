"""Packed weights: functions that turn the bytes of an encoding into numbers, compiled where numba is installed."""
