"""Benchmark scripts, and recorded results with the machine and the date."""
