"""Shards → label files, and the proof that nothing is missing."""
