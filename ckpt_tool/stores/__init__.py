"""Where checkpoints lie and results are published: a line for each kind of store in ``known``."""
