"""Experts on demand: the weights of a mixture that tokens are routed to, read when the router has spoken, and kept in cells."""
