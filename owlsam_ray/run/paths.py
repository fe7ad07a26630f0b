"""Names of the files in a run directory."""

FAILURES = "failures.jsonl"

RUN_FILE = "run.json"

QUERY_FILE = "query_embeddings.safetensors"
