"""What a run takes on which machine: memory, samples, tokens, hours, disk."""
