"""Compares with peers, for ``layerstream bench``: contenders run in turn, each in its own process."""
