"""From a catalogue to the files that a DeepSpeed run would have saved."""
