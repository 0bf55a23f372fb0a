"""Hugging Face safetensors directories."""
