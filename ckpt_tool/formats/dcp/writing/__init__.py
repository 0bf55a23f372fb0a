"""From a catalogue to the files that a DCP run would have saved."""
