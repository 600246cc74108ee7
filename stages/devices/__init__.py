"""Devices: where computation runs, and how bytes get there."""
