"""Notebooks executed in order into a run folder, and their pages."""
