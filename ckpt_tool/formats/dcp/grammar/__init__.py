"""What keys and chunks of a DCP checkpoint mean, in every framework's dialect."""
