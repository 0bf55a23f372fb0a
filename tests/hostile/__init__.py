"""Hostile and damaged files, each named by what is wrong with it."""
