"""Question files answered at scale: read, handed out to workers, journaled, scored."""
