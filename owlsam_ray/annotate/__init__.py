"""One attempt to label a run: the Ray graph, waves, and isolation of images that kill processes."""
