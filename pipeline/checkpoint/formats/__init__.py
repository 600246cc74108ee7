"""The formats of weight files: one module each."""
