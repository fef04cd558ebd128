"""Tests of the checkpoint format and the store."""
