"""Labels against a ground truth: average precision, matched masks, seconds per image."""
