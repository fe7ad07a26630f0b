"""Commands to try before a run: check, preview, estimate."""
