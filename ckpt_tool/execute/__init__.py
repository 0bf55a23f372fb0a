"""Carrying out a plan. One module per place to run it; ``budget`` beside them."""
