"""The command line's input and output: arguments, progress, tables, plots, tokens as text."""
