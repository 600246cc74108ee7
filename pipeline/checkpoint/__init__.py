"""What weight files hold: tensors with file, offset, dtype and shape, and how they form layers. Reads headers only."""
