"""One attempt to label a run: the Ray graph, waves, isolation of images that kill processes."""
