"""Names of files in a run directory."""

FAILURES = "failures.jsonl"
