"""The ``layerstream`` command and its parts. Nothing here is imported by the library."""
