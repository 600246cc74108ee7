"""Checkpoint + machine + workload + budget -> plan. Pure: no I/O."""
