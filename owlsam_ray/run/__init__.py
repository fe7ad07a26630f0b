"""The run directory: record, manifest, shards, attempts, and the rules that every stored row satisfies."""
