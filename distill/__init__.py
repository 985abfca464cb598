"""Distil several frozen vision foundation models into one compact student."""
