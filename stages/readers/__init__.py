"""Readers: how bytes get from the weight files into slots."""
