"""What the weight files hold: tensors with file, offset, dtype and shape, and which belong together. Headers only."""
