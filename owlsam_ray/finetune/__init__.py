"""Training data, losses and the loop that adapt detector and segmenter, and directories that `annotate` loads."""
