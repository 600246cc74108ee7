"""Many requests share sweeps: admission, the scheduler, and the passes that hold layer batches."""
