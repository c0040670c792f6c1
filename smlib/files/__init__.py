"""Files that are whole or not there: atomic writes, stages on disk, checkpoints, the user's own folders."""
