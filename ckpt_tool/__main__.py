"""``python -m ckpt_tool``."""

from ckpt_tool.cli import main

main()
