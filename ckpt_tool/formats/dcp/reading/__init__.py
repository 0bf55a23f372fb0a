"""From DCP directories to a catalogue."""
