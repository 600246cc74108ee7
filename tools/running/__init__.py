"""What commands share of running a model: reading its files ahead, a generation or sweeps, measured."""
