"""Functions that numba compiles. Importing a module of this folder imports numba; ``compiling`` does so when one is needed."""
