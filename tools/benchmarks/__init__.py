"""Benchmarks: scripts that measure, and what they measured, with the machine and the date."""
