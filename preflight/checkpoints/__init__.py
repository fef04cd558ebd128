"""Checkpoint folders: their format, and the store that holds several."""
