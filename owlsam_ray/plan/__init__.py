"""Planning: turn a listing into the manifest of a run (which images, in which order, in which shards)."""
