"""Before a run: check, preview, estimate."""
