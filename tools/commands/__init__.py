"""The subcommands of ``layerstream``: one file each."""
