"""Runs one plan: takes its memory, starts and supervises the stages, hands out sweeps, swaps residents."""
