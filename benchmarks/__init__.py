"""Measurements behind every figure the documents claim; nothing imports them."""
