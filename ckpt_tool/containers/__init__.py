"""Bytes on disk: torch's zip archives, safetensors headers, and pickles that run nothing."""
