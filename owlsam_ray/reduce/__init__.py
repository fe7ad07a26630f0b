"""Turn shards into label files, and prove that no image is missing."""
