"""Checkpoint formats, one module each: how it is read, and how it is laid out. ``registry`` lists them."""
