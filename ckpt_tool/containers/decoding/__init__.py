"""Decoding quantised tensors: one module per kind of scheme, one line per scheme in ``known``."""
