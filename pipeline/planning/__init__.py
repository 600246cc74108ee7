"""Checkpoint + machine + workload + budget -> plan. Pure: no file and no device is touched."""
