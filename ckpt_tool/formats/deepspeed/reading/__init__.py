"""From the files of a DeepSpeed run to a catalogue."""
