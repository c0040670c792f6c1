"""A run: its settings, its questions, and the stages of both systems on disk."""
