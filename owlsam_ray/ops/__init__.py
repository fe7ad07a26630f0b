"""Pure functions on arrays: boxes, masks, run-length codes."""
