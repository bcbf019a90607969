"""Data sets: pictures (C, H, W) uint8 with a class, and where known the box of the object."""
