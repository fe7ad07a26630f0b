"""Fine-tune detector and segmenter: data, losses and the loop, and directories that `annotate` loads."""
