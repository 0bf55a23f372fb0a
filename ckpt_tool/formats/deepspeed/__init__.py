"""DeepSpeed's checkpoint formats."""
