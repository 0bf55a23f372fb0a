"""The engine's own rules, each stated once with its release and function: pure numbers and names."""
